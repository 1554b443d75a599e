"""What a task costs its server until the first status of its run is in the log."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import operators
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Client, Task
from dstack_core.local import LocalServer
from tests.provider_airflow.test_operator import TI, operator
from tests.provider_airflow.versions import TaskDeferred

_MOST = ["/users/get_my_user", "/runs/get_plan", "/runs/get", "/runs/apply"]
# The server is asked whether it has the file with which runs report.
_WITH_REPORTS = [*_MOST[:2], "/files/get_archive_by_hash", *_MOST[2:]]


class Requests(logging.Handler):
    """The log of a task, which notes the requests that the server had got at each line."""

    def __init__(self, server: LocalServer) -> None:
        super().__init__()
        self._server = server
        self._before = len(server.requests)
        self.lines: list[tuple[str, list[str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        paths = [request.path for request in self._server.requests[self._before :]]
        self.lines.append((record.getMessage(), paths))

    def until(self, pattern: str) -> list[str]:
        """Return the paths of the requests before the first line that matches."""
        return next(paths for text, paths in self.lines if re.fullmatch(pattern, text))

    def count(self, pattern: str) -> int:
        return sum(1 for text, _ in self.lines if re.fullmatch(pattern, text))


@pytest.fixture
def warm(server: LocalServer) -> LocalServer:
    """Return a server that has had a run, which could report."""
    with server.client() as client:
        client.runs.submit(Task(commands=["true"]), reports=True).wait(60, poll_interval=0.1)
    return server


@pytest.mark.parametrize("reports", [False, True], ids=["plain", "reports"])
@pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferred"])
def test_the_first_status_takes_four_requests(
    warm: LocalServer, monkeypatch: pytest.MonkeyPatch, deferrable: bool, reports: bool
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.5)
    requests = Requests(warm)
    task = operator(
        configuration={"type": "task", "commands": ["sleep 2"]},
        deferrable=deferrable,
        poll_interval=0.1,
        reports=reports,
    )
    logger = logging.Logger("task")
    logger.addHandler(requests)
    monkeypatch.setattr(DstackRunOperator, "log", logger)
    context: Any = {"ti": SimpleNamespace(**vars(TI))}
    if deferrable:
        with pytest.raises(TaskDeferred):
            task.execute(context)
    else:
        task.execute(context)
    asked = requests.until(r"Run \S+ is (submitted|provisioning|running)( \(.*\))?")
    paths = [path.removeprefix(f"/api/project/{warm.project}").removeprefix("/api") for path in asked]
    assert paths == (_WITH_REPORTS if reports else _MOST)
    # The reply to the submission and the first poll show the same status, which is logged once.
    assert requests.count(r"Run \S+ is submitted") == 1


def test_one_client_serves_a_task_that_has_code(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[Client] = []
    closed: list[Client] = []
    open_one, close_one = Client.__init__, Client.close

    def new(self: Client, **arguments: Any) -> None:
        opened.append(self)
        open_one(self, **arguments)

    def close(self: Client) -> None:
        closed.append(self)
        close_one(self)

    monkeypatch.setattr(Client, "__init__", new)
    monkeypatch.setattr(Client, "close", close)
    (tmp_path / "train.py").write_text("print('trained')")
    task = operator(repo_dir=tmp_path, local_repo=True, poll_interval=0.1)
    context: Any = {"ti": SimpleNamespace(**vars(TI))}
    task.execute(context)
    (client,) = opened
    assert client in closed
