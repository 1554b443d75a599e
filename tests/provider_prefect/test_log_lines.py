"""Progress bars, times, waiting and failures in the log of a flow run, read back from Prefect's API."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import Task
from dstack_core._flow import partial_lines
from dstack_core.integration import describe_failure
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import log_records
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

# It moves until its file exists.
_BAR = r"while [ ! -e {} ]; do for i in 1 2 3; do printf '\r %s0%%|##|' $i; sleep 0.3; done; done; "
_LAST = r"printf '\r100%%|done\n'"
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "


@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("timestamps", [False, True])
def test_a_progress_bar_shows_its_state_and_its_line_once(
    task: Any,
    timestamps: bool,
    credentials: DstackCredentials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partial_lines, "_OPEN_SECONDS", 0.1)
    monkeypatch.setattr(partial_lines, "_SECONDS_BETWEEN", 0.5)
    ids: list[UUID] = []

    @flow
    def working() -> None:
        ids.append(UUID(flow_run.get_id()))
        watcher.start()
        configuration = Task(commands=[_BAR.format(tmp_path / "go") + _LAST, "echo the-end"])
        task.submit(configuration, credentials, log_timestamps=timestamps, **FAST).result()

    def look() -> None:
        try:
            log_records(ids[0], last="(still running)", seconds=120)
        finally:
            (tmp_path / "go").touch()

    watcher = threading.Thread(target=look)
    working()
    watcher.join()
    lines = [line for text in log_records(ids[0], last="the-end") for line in text.split("\n")]
    time = _TIME if timestamps else ""
    assert len([line for line in lines if re.fullmatch(time + r" \d0%\|##\| \(still running\)", line)]) >= 1
    assert len([line for line in lines if re.fullmatch(time + r"100%\|done", line)]) == 1
    assert len([line for line in lines if re.fullmatch(time + "the-end", line)]) == 1


def test_the_last_lines_of_a_failed_run_are_in_the_log_once(credentials: DstackCredentials) -> None:
    ids: list[UUID] = []

    @flow
    def failing() -> None:
        ids.append(UUID(flow_run.get_id()))
        # Prefect logs a traceback, which quotes this line.
        run_task(Task(commands=["echo THE-LAST-WORDS | tr A-Z a-z", "exit 3"]), credentials, **FAST)

    state: Any = failing(return_state=True)
    assert "the-last-words" not in state.message
    records = log_records(ids[0], last="Finished in state")
    assert sum(text.count("the-last-words") for text in records) == 1


def test_lines_that_the_log_does_not_show_are_in_the_error(credentials: DstackCredentials) -> None:
    @flow
    def failing() -> None:
        configuration = Task(commands=["echo the-last-words", "exit 3"])
        run_task(configuration, credentials, stream_logs=False, **FAST)

    state = failing(return_state=True)
    error: Any = state.result(raise_on_failure=False)
    assert str(error) == describe_failure(error.outcome, ["the-last-words"])
    assert error.last_lines == ("the-last-words",)
