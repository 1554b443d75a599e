"""Flows whose processes are killed while they follow a run: ``python -m tests.provider_prefect.killed_flows``."""

from __future__ import annotations

import os
from typing import Any

from prefect import flow, get_run_logger, serve
from pydantic import SecretStr

from prefect_dstack import DstackCredentials, arun_task, run_task

# The start of the last record of a flow run that ended.
ENDED = "The run ended as "
AT_ONCE = 20


def _credentials(url: str, project: str) -> DstackCredentials:
    # The parameters of a flow run are shown in the UI, so they must not contain the token.
    token = SecretStr(os.environ["DSTACK_TOKEN"])
    return DstackCredentials(server_url=url, project_name=project, user_token=token)


def _tell_end(outcome: dict[str, Any]) -> None:
    get_run_logger().info("%s%s", ENDED, outcome["status"])


@flow
def killed(url: str, project: str, configuration: dict[str, Any], options: dict[str, Any]) -> None:
    """Call the sync task."""
    _tell_end(run_task(configuration, _credentials(url, project), on_crash="keep", **options))


@flow
async def akilled(url: str, project: str, configuration: dict[str, Any], options: dict[str, Any]) -> None:
    """Await the async task."""
    _tell_end(await arun_task(configuration, _credentials(url, project), on_crash="keep", **options))


FLOWS: dict[str, Any] = {"killed": killed, "akilled": akilled}


if __name__ == "__main__":
    serve(*(item.to_deployment(name) for name, item in FLOWS.items()), limit=AT_ONCE)
