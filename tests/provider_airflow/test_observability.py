"""A task's run in Airflow's metrics, in the task's trace, and in OpenLineage."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from airflow_provider_dstack import _callbacks, _lineage, operators
from airflow_provider_dstack._from_operator import submit_arguments
from airflow_provider_dstack.errors import DstackRunFailed
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import runs_of
from tests.provider_airflow.test_callbacks import again
from tests.provider_airflow.test_deferral import deferrable, deferred
from tests.provider_airflow.test_operator import CONTEXT, TI, operator
from tests.provider_airflow.test_relay import OUTCOME
from tests.provider_airflow.triggering import payloads


class Stats:
    """A stand-in for Airflow's metrics that keeps what is counted."""

    def __init__(self) -> None:
        self.counted: dict[str, float] = {}
        self.gauges: dict[str, float] = {}
        self.tags: dict[str, str] = {}

    def incr(self, name: str, count: float = 1, tags: dict[str, str] | None = None) -> None:
        self.counted[name] = self.counted.get(name, 0) + count
        self.tags = tags or self.tags

    def gauge(self, name: str, value: float, tags: dict[str, str]) -> None:
        self.gauges[name] = value


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> Stats:
    found = Stats()
    monkeypatch.setattr(_callbacks, "stats", lambda: found)
    return found


def quick(*commands: str, **arguments: Any) -> Any:
    return operator(
        configuration={"type": "task", "commands": list(commands)}, poll_interval=0.1, **arguments
    )


def test_metrics_are_off_by_default(server: LocalServer, stats: Stats) -> None:
    quick("true").execute(CONTEXT)
    assert not stats.counted


@pytest.mark.parametrize("switch", ["STATSD_ON", "OTEL_ON", "STATSD_DATADOG_ENABLED"])
def test_a_run_is_counted_once(
    server: LocalServer, stats: Stats, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(f"AIRFLOW__METRICS__{switch}", "True")
    with pytest.raises(DstackRunFailed):
        quick("sleep 0.5; exit 3").execute(CONTEXT)
    assert stats.counted.keys() == {"dstack.runs", "dstack.runs.failed", "dstack.cost_usd"}
    assert stats.counted["dstack.runs"] == stats.counted["dstack.runs.failed"] == 1
    assert stats.tags["status"] == "failed"
    assert stats.gauges["dstack.wait_seconds"] >= 0
    assert stats.gauges["dstack.duration_seconds"] > 0


def test_a_deferred_run_is_counted_once(
    server: LocalServer, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "True")
    task = deferrable("sleep 2")
    (payload,) = asyncio.run(payloads(again(deferred(task).trigger)))
    assert not stats.counted
    deferrable("sleep 2").execute_complete(CONTEXT, json.loads(json.dumps(payload)))
    assert stats.counted["dstack.runs"] == 1
    assert "dstack.wait_seconds" in stats.gauges


def test_metrics_that_fail_do_not_fail_the_task(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "True")
    monkeypatch.setattr(_callbacks, "stats", lambda: None)
    assert quick("true").execute(CONTEXT)["status"] == "done"
    assert "Could not report run" in capsys.readouterr().out


def test_airflow_has_the_metrics() -> None:
    from airflow_provider_dstack._compat import stats

    for name in ("incr", "gauge"):
        assert callable(getattr(stats(), name))


# Traces, with OpenTelemetry's own SDK.


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def times(span: Any) -> tuple[float, float]:
    """Return the begin and the end of a span, in seconds since the epoch."""
    return span.start_time / 1e9, span.end_time / 1e9


@contextmanager
def task_span() -> Iterator[str]:
    """Be in a span, as Airflow's task runner is; yield its ``TRACEPARENT``."""
    with trace.use_span(trace.get_tracer("airflow").start_span("worker.train")) as span:
        context = span.get_span_context()
        yield f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def test_a_run_is_part_of_the_tasks_trace(
    server: LocalServer, spans: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    with task_span() as parent:
        quick("sleep 0.5; echo parent=$TRACEPARENT").execute(CONTEXT)
    (run,) = runs_of(server, "airflow:d/")
    assert f"parent={parent}" in capsys.readouterr().out
    found: dict[str, Any] = {span.name: span for span in spans.get_finished_spans()}
    assert {"dstack.run", "dstack.queued", "dstack.running"} <= set(found)
    outer = found["dstack.run"]
    assert f"{outer.context.trace_id:032x}" in parent
    assert outer.parent is not None
    assert f"{outer.parent.span_id:016x}" in parent
    for name in ("dstack.queued", "dstack.running"):
        inner = found[name]
        assert inner.parent is not None
        assert inner.parent.span_id == outer.context.span_id
        (begin, end), (first, last) = times(outer), times(inner)
        assert begin <= first <= last <= end
    assert outer.attributes is not None
    assert outer.attributes["dstack.run.name"] == run.name
    first, last = times(found["dstack.running"])
    assert last - first > 0.3


def test_a_deferred_run_is_part_of_the_trace(server: LocalServer, spans: InMemorySpanExporter) -> None:
    with task_span():
        caught = deferred(deferrable("sleep 2; exit 3"))
    (payload,) = asyncio.run(payloads(again(caught.trigger)))
    with task_span() as parent, pytest.raises(DstackRunFailed):
        deferrable("sleep 2; exit 3").execute_complete(CONTEXT, json.loads(json.dumps(payload)))
    found: dict[str, Any] = {span.name: span for span in spans.get_finished_spans()}
    assert f"{found['dstack.run'].context.trace_id:032x}" in parent
    assert not found["dstack.run"].status.is_ok
    # The times are those of the worker and the trigger, before this task resumed.
    first, last = times(found["dstack.running"])
    assert last - first > 1


def test_a_variable_of_the_user_wins(server: LocalServer, spans: InMemorySpanExporter) -> None:
    mine = {"type": "task", "commands": ["true"], "env": {"TRACEPARENT": "mine"}}
    with task_span():
        assert "TRACEPARENT" not in (submit_arguments(operator(configuration=mine), CONTEXT)["env"] or {})
        given = operator(env={"TRACEPARENT": "mine"})
        assert submit_arguments(given, CONTEXT)["env"] == {"TRACEPARENT": "mine"}


@pytest.mark.parametrize(("on_active", "is_traced"), [("update", False), ("replace", True)])
def test_a_service_that_is_updated_keeps_its_variables(
    server: LocalServer, spans: InMemorySpanExporter, on_active: Any, is_traced: bool
) -> None:
    service = {"type": "service", "port": 80, "commands": ["true"]}
    task = DstackServiceOperator(task_id="serve", configuration=service, on_active=on_active, run_name="api")
    with task_span():
        env = submit_arguments(task, CONTEXT)["env"]
    assert ("TRACEPARENT" in (env or {})) is is_traced


def test_without_a_trace_nothing_is_added(server: LocalServer, spans: InMemorySpanExporter) -> None:
    assert submit_arguments(operator(), CONTEXT)["env"] is None
    quick("true").execute(CONTEXT)
    assert not spans.get_finished_spans()


# OpenLineage. test_real_telemetry.py has the provider; here a stand-in has the names of it that are used.


@dataclass
class Lineage:
    """``OperatorLineage``, and the other classes with the same arguments."""

    outputs: list[Any] = field(default_factory=list)
    run_facets: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def openlineage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(is_disabled=False, breaks=False)

    def parent(ti: Any) -> str:
        if state.breaks:
            raise RuntimeError("no such task")
        return f"prod/{ti.dag_id}.{ti.task_id}/run"

    class RunFacet: ...

    modules: dict[str, dict[str, Any]] = {
        "airflow.providers.openlineage": {},
        "airflow.providers.openlineage.conf": {"is_disabled": lambda: state.is_disabled},
        "airflow.providers.openlineage.plugins.macros": {
            "lineage_job_namespace": lambda: "prod",
            "lineage_job_name": lambda ti: f"{ti.dag_id}.{ti.task_id}",
            "lineage_parent_id": parent,
            "lineage_root_parent_id": lambda ti: f"prod/{ti.dag_id}/root",
        },
        "airflow.providers.openlineage.extractors.base": {"OperatorLineage": Lineage},
        "openlineage.client.event_v2": {"Dataset": lambda namespace, name: (namespace, name)},
        "openlineage.client.facet_v2": {
            "RunFacet": RunFacet,
            "external_query_run": SimpleNamespace(ExternalQueryRunFacet=SimpleNamespace),
        },
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    _lineage._run_facet.cache_clear()
    return state


def test_the_task_is_the_parent_of_what_the_run_reports(openlineage: SimpleNamespace) -> None:
    assert submit_arguments(operator(env={"A": "1"}), CONTEXT)["env"] == {
        "OPENLINEAGE_NAMESPACE": "prod",
        "OPENLINEAGE_PARENT_ID": "prod/d.train/run",
        "OPENLINEAGE_ROOT_PARENT_ID": "prod/d/root",
        "A": "1",
    }


def test_lineage_that_is_switched_off_or_broken_adds_nothing(
    openlineage: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    openlineage.breaks = True
    assert submit_arguments(operator(), CONTEXT)["env"] is None
    openlineage.is_disabled = True
    assert submit_arguments(operator(), CONTEXT)["env"] is None
    assert _lineage.facets(OUTCOME, []) is None


def test_the_facets_of_a_run_that_has_ended(server: LocalServer, openlineage: SimpleNamespace) -> None:
    asset = "python3 -c \"import dstack_report; dstack_report.asset('s3://bucket/a/b.parquet')\""
    task = quick(asset)
    assert task.get_openlineage_facets_on_complete(TI) == Lineage()
    outcome = task.execute(CONTEXT)
    lineage = task.get_openlineage_facets_on_complete(TI)
    assert lineage.outputs == [("s3://bucket", "a/b.parquet")]
    facets = lineage.run_facets
    assert facets["externalQuery"].externalQueryId == outcome["run_id"]
    assert facets["dstack"].run_name == outcome["run_name"]
    assert facets["dstack"].cost_usd == outcome["cost"]


def test_without_a_transport_nothing_of_the_client_is_imported() -> None:
    code = (
        "import sys; from airflow_provider_dstack._lineage import facets, lineage_env; "
        "assert lineage_env(None, None) == {} and facets(None, []) is None; "
        "assert not [name for name in sys.modules if name.startswith('openlineage')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_character_that_metrics_do_not_have_is_replaced(stats: Stats) -> None:
    machine = replace(OUTCOME, instance="NVIDIA GeForce RTX 4090, \u00e4=1", backend="runpod")
    _callbacks._count(machine, {"submitted": 1.0, "running": 3.0})
    assert stats.tags["instance"] == "NVIDIA_GeForce_RTX_4090____1"
    assert stats.gauges["dstack.wait_seconds"] == 2.0


def test_the_wait_of_a_run_that_was_seen_late_is_unknown(stats: Stats) -> None:
    _callbacks._count(OUTCOME, {"running": 3.0, "done": 4.0})
    assert "dstack.wait_seconds" not in stats.gauges
