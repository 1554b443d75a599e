"""Traces, metrics and lineage of runs in a real Airflow, with real receivers of all three.

Airflow's own OpenTelemetry, StatsD client and OpenLineage provider report here: a deferred task is three
processes, and must still be one trace, one count and one lineage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow import conftest
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import runs_of, wait_for
from tests.provider_airflow.telemetry_servers import (
    Collector,
    StatsdPort,
    attributes_of,
    collecting,
    statsd_port,
)
from tests.provider_airflow.test_browser import SCREENSHOTS
from tests.provider_airflow.trace_picture import Bar, draw

pytest.importorskip("airflow.providers.openlineage")
pytest.importorskip("statsd")
# The components start and four tasks run in the fixture of the first test.
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

TASKS = ("sync_ok", "sync_bad", "deferred_ok", "deferred_bad")
FAILED = ("sync_bad", "deferred_bad")
_PHASES = ["dstack.queued", "dstack.provisioning", "dstack.pulling", "dstack.running"]


class Telemetry:
    """What one DAG run with four tasks has reported: spans, metrics, and OpenLineage's events."""

    def __init__(self, server: LocalServer, dag_run: str, collector: Collector, port: StatsdPort) -> None:
        self.server, self.dag_run = server, dag_run
        self.collector, self.port = collector, port
        self.lineage: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}

    def run(self, task: str) -> Run:
        (run,) = runs_of(self.server, f"airflow:telemetry/{self.dag_run}/{task}/")
        return run.refresh()

    def spans_of_run(self, task: str) -> list[Any]:
        name = self.run(task).name
        spans = self.collector.named("dstack.run")
        return [span for span in spans if attributes_of(span)["dstack.run.name"] == name]

    def env(self, task: str) -> dict[str, str]:
        """Return the variables that the run has logged."""
        return dict(re.findall(r"(TRACEPARENT|OPENLINEAGE_\w+)=([\w./:-]+)", self.texts[task]))


@pytest.fixture(scope="module")
def telemetry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Telemetry]:
    home = tmp_path_factory.mktemp("telemetry") / "home"
    home.mkdir()
    events = home / "lineage.jsonl"
    with (
        # Slow enough for a poll to see every status.
        LocalServer(stop_grace_seconds=2.0, step_seconds=1.0) as server,
        collecting() as collector,
        statsd_port() as port,
    ):
        settings = {
            "AIRFLOW__TRACES__OTEL_ON": "True",
            "OTEL_TRACES_EXPORTER": "otlp_proto_http",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
            "AIRFLOW__METRICS__STATSD_PORT": str(port.port),
            "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
            # Four tasks start at once: on a busy machine a heartbeat is late.
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "900",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "900",
            "AIRFLOW__OPENLINEAGE__NAMESPACE": "prod",
            "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(
                {"type": "file", "log_file_path": str(events), "append": True}
            ),
        }
        for started in conftest.run_components(server, home, request, **settings):
            found = Telemetry(server, started.trigger("telemetry"), collector, port)
            started.wait_for_run_end("telemetry", found.dag_run, 400.0)
            wait_for("spans of all runs", lambda: len(collector.named("dstack.run")) == len(TASKS), 120.0)
            wait_for("lineage of all tasks", lambda: len(ends(events)) == len(TASKS), 60.0)
            found.lineage = ends(events)
            found.texts = {task: log_of(started, found.dag_run, task) for task in TASKS}
            yield found


def ends(path: Path) -> list[dict[str, Any]]:
    """Return the events of tasks that have ended."""
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        event
        for event in events
        if event["eventType"] in ("COMPLETE", "FAIL") and "." in event["job"]["name"]
    ]


def log_of(components: Components, dag_run: str, task: str) -> str:
    path = f"/api/v2/dags/telemetry/dagRuns/{dag_run}/taskInstances/{task}/logs/1?full_content=true"
    return json.dumps(components.call("GET", path)["content"])


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_one_part_of_its_tasks_trace(telemetry: Telemetry, task: str) -> None:
    (outer,) = telemetry.spans_of_run(task)
    workers = telemetry.collector.named(f"worker.{task}")
    (parent,) = [span for span in workers if span.span_id == outer.parent_span_id]
    assert outer.trace_id == parent.trace_id
    # The run's own code has the first process of the task as its parent, in the same trace.
    version, trace_id, span_id, flags = telemetry.env(task)["TRACEPARENT"].split("-")
    assert (version, trace_id, flags) == ("00", outer.trace_id.hex(), "01")
    assert span_id in {span.span_id.hex() for span in workers}
    phases = telemetry.collector.below(outer)
    names = [span.name for span in phases]
    assert names == [name for name in _PHASES if name in names]
    # On a busy machine, the triggerer may see a run only after its end.
    assert names[-1] == "dstack.running" or task.startswith("deferred")
    assert outer.start_time_unix_nano <= phases[0].start_time_unix_nano
    for earlier, later in pairwise(phases):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert phases[-1].end_time_unix_nano <= outer.end_time_unix_nano
    running = (phases[-1].end_time_unix_nano - phases[-1].start_time_unix_nano) / 1e9
    assert running > 1 or task.startswith("deferred")
    attributes = attributes_of(outer)
    assert attributes.get("error.type", "") == ("user.exit" if task in FAILED else "")
    assert (outer.status.code == outer.status.STATUS_CODE_ERROR) is (task in FAILED)


def test_a_trace_is_shown_as_one_waterfall(telemetry: Telemetry) -> None:
    task = "deferred_bad"
    (outer,) = telemetry.spans_of_run(task)
    spans = [span for span in telemetry.collector.spans if span.trace_id == outer.trace_id]
    inside = {outer.span_id: 2, **{span.span_id: 3 for span in telemetry.collector.below(outer)}}
    shown = [span for span in spans if span.name.endswith(f".{task}") or span.span_id in inside]
    bars = [
        Bar(
            span.name,
            span.start_time_unix_nano / 1e9,
            span.end_time_unix_nano / 1e9,
            inside.get(span.span_id, 0 if span.name.startswith("task_run") else 1),
            span.status.code == span.status.STATUS_CODE_ERROR,
        )
        for span in shown
    ]
    # Those of Airflow by their begin, the run's last: it began before the task resumed that reports it.
    bars.sort(key=lambda bar: (bar.depth > 1, bar.begin, -bar.end))
    names = [bar.name for bar in bars]
    assert names.count(f"worker.{task}") == 2, names
    assert names.count(f"trigger.{task}") == 1
    assert names.count("dstack.run") == 1
    (picture := SCREENSHOTS / "airflow-trace.svg").parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(draw(bars))


def test_every_run_is_counted_once(telemetry: Telemetry) -> None:
    # A metric may be in another packet, sent at the same time: wait for the last of them.
    wait_for("metrics", lambda: len(telemetry.port.of("airflow.dstack.duration_seconds")) == len(TASKS), 60.0)
    done, failed = (telemetry.port.of(f"airflow.dstack.runs.{status}:") for status in ("done", "failed"))
    assert done == ["airflow.dstack.runs.done:1|c"] * 2
    assert failed == ["airflow.dstack.runs.failed:1|c"] * 2
    counted = telemetry.port.of("airflow.dstack.runs,")
    assert len(counted) == len(TASKS)
    assert len([line for line in counted if ",category=user.exit" in line and ",status=failed" in line]) == 2
    for name, kind in (("cost_usd", "c"), ("wait_seconds", "g"), ("duration_seconds", "g")):
        lines = telemetry.port.of(f"airflow.dstack.{name},status=")
        # The wait of a run that was never seen running is unknown.
        assert len(lines) == len(TASKS) or (name == "wait_seconds" and len(lines) >= 2), name
        assert all(line.endswith(f"|{kind}") for line in lines)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_part_of_the_lineage(telemetry: Telemetry, task: str) -> None:
    run, env = telemetry.run(task), telemetry.env(task)
    (event,) = [event for event in telemetry.lineage if event["job"]["name"] == f"telemetry.{task}"]
    assert event["eventType"] == ("FAIL" if task in FAILED else "COMPLETE")
    facets = event["run"]["facets"]
    assert facets["externalQuery"]["externalQueryId"] == run.id
    assert facets["externalQuery"]["source"] == run.url
    assert facets["dstack"]["run_name"] == run.name
    assert facets["dstack"]["status"] == run.raw_status
    assert facets["dstack"].get("category") == ("user.exit" if task in FAILED else None)
    assert [(each["namespace"], each["name"]) for each in event["outputs"]] == [
        ("s3://bucket", "a/b.parquet")
    ]
    assert env["OPENLINEAGE_NAMESPACE"] == event["job"]["namespace"] == "prod"
    assert env["OPENLINEAGE_PARENT_ID"] == f"prod/telemetry.{task}/{event['run']['runId']}"
    root = facets["parent"]["root"]
    assert env["OPENLINEAGE_ROOT_PARENT_ID"] == f"prod/telemetry/{root['run']['runId']}"
    assert "OpenLineage extractor returns" not in telemetry.texts[task]
