"""Bad input: a clear error, and nothing is submitted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from dstack_core import ConfigurationError, ProjectNotConfiguredError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import submissions

pytestmark = pytest.mark.usefixtures("prefect_server")

TASK = {"type": "task", "commands": ["echo hi"]}

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ({"type": "tusk", "commands": []}, {}, "tusk"),
    (
        {"type": "task", "commands": ["x"], "python": "3.11", "image": "y"},
        {},
        "expected either python or image",
    ),
    ({"type": "task", "commands": ["x"], "env": ["NAME"]}, {}, "expected a value for NAME"),
    ("no/such/file.dstack.yml", {}, "no/such/file.dstack.yml"),
    (17, {}, "configuration: expected a Task, .*got 17"),
    (TASK, {"run_name": "Not A Name"}, "run_name"),
    (TASK, {"spot_policy": "cheap"}, "spot_policy"),
    (TASK, {"max_duration": -2}, "max_duration"),
    (TASK, {"max_price": 0}, "max_price"),
    (TASK, {"poll_interval": 0}, "poll_interval"),
    (TASK, {"log_budget_bytes": -1}, "log_budget_bytes"),
    (TASK, {"log_budget_bytes": "10 MB"}, "log_budget_bytes"),
    (TASK, {"retry_budget": -1}, "retry_budget"),
    (TASK, {"on_crash": "explode"}, "on_crash"),
    (TASK, {"credentials": 5}, "credentials"),
    (TASK, {"mask_env": ["NOPE"], "env": {"A": "b"}}, r"mask_env: .* run's env \(A\), got 'NOPE'"),
]


@pytest.mark.parametrize(("configuration", "options", "told"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named_and_nothing_is_submitted(
    configuration: Any,
    options: dict[str, Any],
    told: str,
    dstack: LocalServer,
    credentials: DstackCredentials,
) -> None:
    options = {"credentials": credentials, **options}

    @flow
    def bad() -> None:
        run_task(configuration, **options)

    @flow
    async def abad() -> None:
        await arun_task(configuration, **options)

    with pytest.raises(ConfigurationError, match=told):
        bad()
    with pytest.raises(ConfigurationError, match=told):
        asyncio.run(abad())
    assert submissions(dstack) == 0


def test_without_a_server_the_error_names_what_to_set(tmp_path: Path) -> None:
    @flow
    def nowhere() -> None:
        run_task(TASK)

    with pytest.raises(ProjectNotConfiguredError, match="DSTACK_SERVER_URL"):
        nowhere()
