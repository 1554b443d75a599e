"""A run in the trace of its Prefect task, with OpenTelemetry's own SDK and Prefect's own spans."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY, temporary_settings
from prefect.telemetry import run_telemetry

from dstack_core import CallbackEvent, RunCallbacks, RunFailedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackRun, submit_run, wait_for_run

from .support import all_runs
from .ways import FAST, WAYS, Runner

trace = pytest.importorskip("opentelemetry.trace")
sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

pytestmark = pytest.mark.usefixtures("prefect_server")

ECHO = "echo parent=$TRACEPARENT"
SHOWN = Task(commands=[ECHO])
FAILING = Task(commands=["exit 3"])
PHASES = ["dstack.queued", "dstack.provisioning", "dstack.pulling", "dstack.running"]


class Opener(RunCallbacks):
    """A callback that opens a gate when the run is seen running, so that a slow machine does not miss that."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def on_running(self, event: CallbackEvent) -> None:
        self.gate.touch()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have an SDK for one test; a process cannot get rid of a provider that is set for all of it."""
    exporter, provider = in_memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    for module in (trace, run_telemetry):
        monkeypatch.setattr(module, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def traced(spans: Any) -> tuple[Any, Any, list[Any]]:
    """Return the one span of a run, its parent, and the phases of it by their begin."""
    found = spans.get_finished_spans()
    (outer,) = [span for span in found if span.name == "dstack.run"]
    (parent,) = [span for span in found if span.context.span_id == outer.parent.span_id]
    phases = [span for span in found if span.parent and span.parent.span_id == outer.context.span_id]
    return outer, parent, sorted(phases, key=lambda span: (span.start_time, span.end_time))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_part_of_its_tasks_trace(
    way: Runner, dstack: LocalServer, credentials: DstackCredentials, spans: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gated = Task(commands=[ECHO, f"until [ -e {gate} ]; do sleep 0.1; done"])
    way(gated, credentials, callbacks=[Opener(gate)], **FAST)
    outer, parent, phases = traced(spans)
    assert parent.attributes["prefect.run.type"] == "task"
    assert outer.context.trace_id == parent.context.trace_id
    (run,) = all_runs(dstack)
    expected = f"00-{parent.context.trace_id:032x}-{parent.context.span_id:016x}-0"
    assert run.env["TRACEPARENT"].startswith(expected)
    assert f"parent={expected}" in b"".join(run.logs()).decode()
    # Inside the task's span, and one phase after the other; a short one may be missing.
    assert parent.start_time <= outer.start_time + 1e9
    assert outer.end_time <= parent.end_time
    names = [span.name for span in phases]
    assert names[-1] == "dstack.running"
    assert names == [name for name in PHASES if name in names]
    assert outer.start_time <= phases[0].start_time
    for earlier, later in pairwise(phases):
        assert earlier.end_time == later.start_time
    assert phases[-1].end_time <= outer.end_time
    assert outer.attributes["dstack.run.name"] == run.name
    assert outer.status.is_ok


@pytest.mark.parametrize("way", [WAYS[1], WAYS[2]])
def test_a_failed_run_is_an_error_with_its_category(
    way: Runner, dstack: LocalServer, credentials: DstackCredentials, spans: Any
) -> None:
    with pytest.raises(RunFailedError):
        way(FAILING, credentials, **FAST)
    outer, parent, _ = traced(spans)
    assert outer.attributes["error.type"] == outer.attributes["dstack.run.category"] == "user.exit"
    assert not outer.status.is_ok
    assert not parent.status.is_ok


def test_a_run_of_two_tasks_has_the_one_that_submits_as_parent_of_its_code(
    dstack: LocalServer, credentials: DstackCredentials, spans: Any
) -> None:
    @flow
    def apart() -> None:
        wait_for_run(submit_run(SHOWN, credentials), credentials, **FAST)

    apart()
    outer, parent, _ = traced(spans)
    assert parent.name.startswith("wait_for_run")
    (run,) = all_runs(dstack)
    _, trace_id, span_id, _ = run.env["TRACEPARENT"].split("-")
    assert int(trace_id, 16) == outer.context.trace_id
    (submitter,) = [span for span in spans.get_finished_spans() if span.context.span_id == int(span_id, 16)]
    assert submitter.name.startswith("submit_run")


def test_a_block_in_a_flow_has_the_flow_as_parent(
    dstack: LocalServer, credentials: DstackCredentials, spans: Any
) -> None:
    @flow
    def blocks() -> None:
        plain = {"type": "task", "commands": ["true"]}
        block = DstackRun(credentials=credentials, configuration=plain, poll_interval=0.1)
        block.trigger().wait_for_completion()

    blocks()
    _, parent, _ = traced(spans)
    assert parent.attributes["prefect.run.type"] == "flow"


def test_without_prefects_spans_nothing_is_traced(
    dstack: LocalServer, credentials: DstackCredentials, spans: Any
) -> None:
    with temporary_settings({PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY: False}):
        WAYS[0](SHOWN, credentials, **FAST)
    (run,) = all_runs(dstack)
    assert "TRACEPARENT" not in run.env
    assert not spans.get_finished_spans()


def test_the_sdk_is_not_imported() -> None:
    code = "import sys, prefect_dstack, prefect_dstack.tasks; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
