"""A server whose every reply is late: what a flow shows of its run is there once, and in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from dstack_core import CallbackEvent, Resources, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials

from .journal import FullJournal
from .test_callbacks import METRIC, check_all
from .ways import FAST, WAYS, Runner

# Seconds that each reply takes.
_SLOW = 1.0


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Run a slow server that measures often; values of short runs are read too."""
    monkeypatch.setattr("dstack_core._flow.utilization._SHORTEST_RUN", 0.0)
    with LocalServer(metrics_seconds=0.1, gpu_usage=(31, 11)) as server:
        server.faults.slow(_SLOW)
        yield server


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("way", WAYS[::2], ids=lambda way: way.__name__)
def test_what_a_run_shows_is_there_once_on_a_slow_server(
    way: Runner, slow: LocalServer, events: list[CallbackEvent], caplog: pytest.LogCaptureFixture
) -> None:
    credentials = DstackCredentials(
        server_url=slow.url, project_name=slow.project, user_token=SecretStr(slow.token)
    )
    commands = ["echo one; sleep 2; echo two", METRIC, "echo '[1, 2]' > $DSTACK_RESULT_FILE"]
    task = Task(commands=commands, resources=Resources(gpu=1))
    outcome = way(task, credentials, callbacks=FullJournal, **FAST)
    assert (outcome["result"], outcome["utilization"]["gpu_mean"]) == ([1, 2], 31.0)
    check_all(events)
    assert caplog.text.count(" finished, ") == 1
    assert caplog.text.count("used GPU 31 % mean, 31 % max; 11 of 80 GB; CPU") == 1
    asked = [request.path for request in slow.requests]
    assert sum(path.endswith("/runs/apply") for path in asked) == 1
    assert sum("/metrics/job/" in path for path in asked) == 1
    # A follower waits for each reply: its requests do not pile up.
    assert len(asked) < 40
