"""``relay_log_again``: the resumed task relays what the triggerer relayed, each line once; no callback twice."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from airflow_provider_dstack import triggers
from airflow_provider_dstack._compat import AirflowTaskTimeout, conf
from airflow_provider_dstack._trigger_relay import TriggerRelay
from airflow_provider_dstack.errors import DstackServerUnreachable
from dstack_core import CallbackEvent, Run, RunCallbacks
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.test_operator import CONTEXT, operator
from tests.provider_airflow.test_remaining_log import ended, fired, line, lines_of, writing
from tests.provider_airflow.test_remaining_log import log as log
from tests.provider_airflow.test_remaining_log import worker_log as worker_log
from tests.provider_airflow.test_trigger_relay import Log
from tests.provider_airflow.triggering import submitted, trigger_for

_REPORT = (
    """echo '::dstack::{"kind":"link","url":"https://example.com/board","text":"board"}'; """
    """echo '::dstack::{"kind":"metric","loss":1}'"""
)

heard: list[str] = []


class Heard(RunCallbacks):
    def on_log_lines(self, event: CallbackEvent) -> None:
        heard.extend(text for text in event.lines if text.startswith("line-"))

    def on_metric(self, event: CallbackEvent) -> None:
        heard.append("metric")

    def on_ended(self, event: CallbackEvent) -> None:
        heard.append("ended")


CALLBACKS = [f"{__name__}.Heard"]


@pytest.fixture(autouse=True)
def nothing_heard() -> None:
    heard.clear()


def resumed(payload: Any, **arguments: Any) -> Any:
    return operator(callbacks=CALLBACKS, deferrable=True, **arguments).execute_complete(CONTEXT, payload)


def assert_heard(lines: list[str]) -> None:
    """Assert that the callbacks were called for each line, for the metric and for the end, once each."""
    assert [what for what in heard if what.startswith("line-")] == lines
    assert [what for what in heard if not what.startswith("line-")] == ["metric", "ended"]
    assert heard[-1] == "ended"


def test_what_the_triggerer_relayed_is_relayed_again_on_request(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    run = ended(server, writing(200, _REPORT))
    payload = fired(run, log, relay_log_again=True, callbacks=CALLBACKS)
    assert "rest" not in payload
    assert resumed(payload)["status"] == "done"
    expected = [line(number) for number in range(200)]
    assert lines_of(log) == lines_of(worker_log) == expected
    assert worker_log.lines[0] == "Relaying again what the triggerer has relayed (relay_log_again)."
    assert sum("https://example.com/board" in text for text in worker_log.lines) == 1
    assert sum(text.startswith(f"Run {run.name} finished") for text in worker_log.lines) == 1
    assert_heard(expected)


def test_without_it_nothing_is_relayed_twice(server: LocalServer, log: Log, worker_log: Log) -> None:
    payload = fired(ended(server, writing(200)), log)
    assert "again" not in payload
    before = len(server.requests)
    resumed(payload)
    assert (lines_of(worker_log), len(server.requests)) == ([], before)


def test_what_the_worker_had_before_the_deferral_is_not_relayed_again(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    run = ended(server, writing(200))
    seen = [event.progress for event in run.follow(poll_interval=0.1) if hasattr(event, "lines")]
    payload = fired(run, log, relay_log_again=True, progress=seen[-1].to_dict(), relayed_bytes=20_000)
    resumed(payload)
    assert (lines_of(log), lines_of(worker_log)) == ([], [])


def test_a_trigger_that_was_behind_has_its_lines_relayed_again_and_the_rest_once(
    server: LocalServer, log: Log, worker_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "TriggerRelay", partial(TriggerRelay, clock=lambda: 1000.0))
    run = ended(server, writing(20_000, _REPORT))
    payload = fired(run, log, relay_log_again=True, callbacks=CALLBACKS)
    assert "rest" in payload
    resumed(payload)
    expected = [line(number) for number in range(20_000)]
    assert lines_of(worker_log) == expected
    assert 0 < len(lines_of(log)) < 20_000
    assert_heard(expected)


@pytest.mark.usefixtures("log")
def test_a_server_that_is_unreachable_costs_the_lines_and_not_the_outcome(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    payload = fired(ended(server, writing(200)), log, relay_log_again=True)
    server.faults.add("/logs/poll", times=None, status=503)
    assert resumed(payload, retry_budget=0.3)["status"] == "done"
    assert any("Could not relay the rest of the log" in text for text in worker_log.lines)


def _timed_out(server: LocalServer, log: Log) -> tuple[Run, Any]:
    run = submitted(server, writing(200, "sleep 600"))
    wait_for("log", lambda: b"line-000000199" in b"".join(run.logs()))
    return run, fired(run, log, relay_log_again=True, deadline=time.time() + 2)


def test_a_timeout_has_the_lines_before_it(server: LocalServer, log: Log, worker_log: Log) -> None:
    _, payload = _timed_out(server, log)
    with pytest.raises(AirflowTaskTimeout):
        resumed(payload)
    assert lines_of(worker_log) == [line(number) for number in range(200)]


def test_a_run_that_keeps_running_is_not_waited_for(server: LocalServer, log: Log, worker_log: Log) -> None:
    run = submitted(server, writing(200, "sleep 600"))
    wait_for("log", lambda: b"line-000000199" in b"".join(run.logs()))
    again = trigger_for(run)._first()
    event = {"kind": "broken", "error": "DstackServerUnreachable", "message": "gone", "again": again}
    with pytest.raises(DstackServerUnreachable, match="gone"):
        resumed(event, on_kill_action="keep")
    assert lines_of(worker_log) == [line(number) for number in range(200)]
    assert not paths(server, "/runs/stop")
    run.stop()


def test_airflows_setting_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operator().relay_log_again is False
    assert conf.getboolean("dstack", "relay_log_again", fallback=False) is False
    monkeypatch.setenv("AIRFLOW__DSTACK__RELAY_LOG_AGAIN", "True")
    assert conf.getboolean("dstack", "relay_log_again", fallback=False) is True


def test_a_trigger_keeps_it_when_it_is_made_again(server: LocalServer) -> None:
    _, arguments = trigger_for(submitted(server, "true"), relay_log_again=True).serialize()
    assert arguments["relay_log_again"] is True
