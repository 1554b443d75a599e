"""A run in a trace: with a stand-in for OpenTelemetry's API here, with the real one in Airflow's tests."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dstack_core import Outcome, RunStatus
from dstack_core.integration import trace_env, trace_run, wait_seconds
from dstack_core.integration.telemetry import phases

SINCE = {
    "submitted": 100.0,
    "provisioning": 110.0,
    "downloading": 130.0,
    "running": 140.0,
    "done": 200.0,
}
OUTCOME = Outcome(
    "train-1", "id-1", "main", RunStatus.DONE, 0, None, "finished", 0.5, 99.0, None, None, None, None, "url"
)


class Tracing:
    """A module ``opentelemetry.trace`` that keeps the spans."""

    StatusCode = SimpleNamespace(ERROR="error")

    def __init__(
        self, *, is_valid: bool = True, state: str = "", flags: int = 1, provider: str = "Some"
    ) -> None:
        self.spans: list[dict[str, Any]] = []
        header = SimpleNamespace(to_header=lambda: state) if state else None
        self.context = SimpleNamespace(
            is_valid=is_valid, trace_id=0xAB, span_id=0xCD, trace_flags=flags, trace_state=header
        )
        self.provider = type(provider, (), {})()

    def get_tracer_provider(self) -> Any:
        return self.provider

    def get_current_span(self) -> Any:
        return SimpleNamespace(get_span_context=lambda: self.context)

    def get_tracer(self, name: str) -> Any:
        return SimpleNamespace(start_span=self.start)

    def set_span_in_context(self, span: Any) -> Any:
        return span.made["name"]

    def start(self, name: str, *, start_time: int, context: Any = None, attributes: Any = None) -> Any:
        made = {"name": name, "start": start_time, "in": context, "attributes": attributes}
        self.spans.append(made)
        return SimpleNamespace(
            made=made,
            end=lambda end_time: made.update(end=end_time),
            set_status=lambda code, text: made.update(status=(code, text)),
        )


@pytest.mark.parametrize("how", ["not loaded", "not configured"])
def test_nothing_where_nothing_is_traced(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    tracing = Tracing(is_valid=False)
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    if how == "not configured":
        monkeypatch.setitem(sys.modules, "opentelemetry.trace", tracing)
    assert trace_env() == {}
    trace_run(OUTCOME, SINCE)
    assert not tracing.spans
    if how == "not loaded":
        assert "opentelemetry.trace" not in sys.modules


def test_the_environment_has_the_current_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Tracing())
    assert trace_env() == {"TRACEPARENT": f"00-{'ab':0>32}-{'cd':0>16}-01"}
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Tracing(state="a=1"))
    assert trace_env()["TRACESTATE"] == "a=1"


@pytest.mark.parametrize("provider", ["ProxyTracerProvider", "NoOpTracerProvider", "TracerProvider"])
def test_only_a_sampler_keeps_the_run_from_recording(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Tracing(flags=0, provider=provider))
    unsampled = {"TRACEPARENT": f"00-{'ab':0>32}-{'cd':0>16}-00"}
    assert trace_env() == (unsampled if provider == "TracerProvider" else {})
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Tracing(provider=provider))
    assert trace_env()["TRACEPARENT"].endswith("-01")


def test_a_run_has_a_span_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = Tracing()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", tracing)
    trace_run(OUTCOME, SINCE)
    shown = [
        (span["name"], span["in"], span["start"] // 10**9, span["end"] // 10**9) for span in tracing.spans
    ]
    assert shown == [
        ("dstack.run", None, 100, 200),
        ("dstack.queued", "dstack.run", 100, 110),
        ("dstack.provisioning", "dstack.run", 110, 130),
        ("dstack.pulling", "dstack.run", 130, 140),
        ("dstack.running", "dstack.run", 140, 200),
    ]
    attributes = tracing.spans[0]["attributes"]
    assert attributes["dstack.run.name"] == "train-1"
    assert "dstack.instance" not in attributes
    assert "status" not in tracing.spans[0]
    assert "error.type" not in attributes


def test_a_failed_run_is_an_error_and_ends_with_its_duration_if_its_end_was_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    tracing = Tracing()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", tracing)
    failed = replace(OUTCOME, status=RunStatus.FAILED, message="failed: oops", category="user.exit")
    trace_run(failed, {"submitted": 100.0})
    run, queued = tracing.spans
    assert run["attributes"]["error.type"] == run["attributes"]["dstack.run.category"] == "user.exit"
    assert run["status"] == ("error", "failed: oops")
    assert (queued["name"], queued["end"] // 10**9) == ("dstack.queued", 199)


@pytest.mark.parametrize(("first", "queued_at"), [("submitted", 101), ("running", None)])
def test_a_run_that_was_seen_late_begins_with_its_duration(
    monkeypatch: pytest.MonkeyPatch, first: str, queued_at: int | None
) -> None:
    tracing = Tracing()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", tracing)
    trace_run(OUTCOME, {first: 150.0, "done": 200.0})
    run, phase = tracing.spans
    assert (run["start"] // 10**9, run["end"] // 10**9) == (101, 200)
    assert phase["start"] // 10**9 == (queued_at or 150)


def test_phases_that_were_not_seen_are_left_out() -> None:
    assert list(phases({"submitted": 1.0, "terminating": 5.0}, 6.0)) == [("queued", 1.0, 6.0)]
    assert list(phases({"running": 2.0, "a-new-status": 3.0}, 6.0)) == [("running", 2.0, 6.0)]
    assert list(phases({}, 6.0)) == []


def test_how_long_a_run_waited() -> None:
    assert wait_seconds(SINCE) == 40.0
    assert wait_seconds({"submitted": 1.0, "failed": 5.0}) is None
    # It ran already when it was taken over.
    assert wait_seconds({"running": 3.0, "done": 5.0}) is None
    assert wait_seconds({}) is None
