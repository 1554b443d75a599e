"""The Prefect task, blocking and async, each in a flow of its own."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import shutil
import tempfile
from typing import Any

_HOME = tempfile.mkdtemp(prefix="prefect-faults-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "DSTACK_"))]:
    del os.environ[_name]
# Set the environment before the import, because Prefect reads it then.
os.environ.update(
    {
        "HOME": _HOME,
        "PREFECT_HOME": f"{_HOME}/.prefect",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "DO_NOT_TRACK": "1",
    }
)

from prefect import flow  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from pydantic import SecretStr  # noqa: E402

from dstack_core import AsyncClient, Client  # noqa: E402
from prefect_dstack import DstackCredentials, arun_task, run_task  # noqa: E402
from tests.faults.case import TIMEOUT, Adapter, Case, Ended, lines_in  # noqa: E402


class _Impatient(DstackCredentials):
    """Credentials whose clients have the timeout of the other adapters."""

    _block_type_slug = "impatient-dstack-credentials"
    patience: float = TIMEOUT

    def get_client(self, **options: Any) -> Client:
        return super().get_client(**options | {"timeout": self.patience})

    def get_async_client(self, **options: Any) -> AsyncClient:
        return super().get_async_client(**options | {"timeout": self.patience})


class _Lines(logging.Handler):
    """The lines of each run, by the name of its task run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        name = getattr(record, "task_run_name", None)
        if name in self.found:
            self.found[name] += lines_in(record.getMessage())


_LINES = _Lines()
_logger = logging.getLogger("prefect.task_runs")
_logger.addHandler(_LINES)
# Keep 500 lines of 500 runs, and errors that are part of the cases, out of the console.
_logger.propagate = False
for _name in ("prefect.flow_runs", "prefect.engine"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def _arguments(case: Case) -> dict[str, Any]:
    _LINES.found[case.name] = []
    credentials = _Impatient(
        server_url=case.url,
        project_name=case.project,
        user_token=SecretStr(case.token),
        patience=case.timeout,
    )
    return {
        "configuration": case.task,
        "credentials": credentials,
        "run_name": case.name,
        "poll_interval": case.poll_interval,
        "retry_budget": case.budget,
        "artifacts": False,
    }


def _ended(case: Case, result: Any, error: BaseException | None = None) -> Ended:
    return Ended(_LINES.found[case.name], result["status"] if result else None, error)


def run_sync(case: Case) -> Ended:
    """Run ``run_task`` in a flow."""

    @flow(name=case.name)
    def life() -> Any:
        return run_task.with_options(task_run_name=case.name)(**_arguments(case))

    try:
        return _ended(case, life())
    except Exception as error:
        return _ended(case, None, error)


def run_async(case: Case) -> Ended:
    """Run ``arun_task`` in an async flow."""

    @flow(name=case.name)
    async def life() -> Any:
        return await arun_task.with_options(task_run_name=case.name)(**_arguments(case))

    try:
        return _ended(case, asyncio.run(life()))
    except Exception as error:
        return _ended(case, None, error)


def host() -> Any:
    """Start a private Prefect server, and stop it."""
    return prefect_test_harness(server_startup_timeout=240)


ADAPTERS = {"Prefect task, sync": Adapter(run_sync), "Prefect task, async": Adapter(run_async)}
