"""What ``airflow dstack doctor`` finds of Airflow: each fault that is planted is named, with what to do."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import EntryPoints
from typing import Any

import pytest
from airflow.jobs.job import Job
from airflow.models import DagModel, TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.session import create_session
from sqlalchemy.exc import OperationalError

from airflow_provider_dstack import _commands, _doctor
from airflow_provider_dstack._compat import DatabaseFacts, ReaperFacts, database_facts, host_name
from airflow_provider_dstack._doctor import airflow_findings
from dstack_core import ServerUnreachableError
from dstack_core.integration import Finding
from tests.ports import free_port
from tests.provider_airflow.health_server import HealthServer, health_server
from tests.provider_airflow.support import DagRunner

PARTS = ("scheduler", "triggerer", "dag_processor")
HEALTHY = {part: {"status": "healthy"} for part in PARTS}
SCHEDULED = ReaperFacts("reap", is_paused=False, is_scheduled=True, last_state="success")
FACTS = DatabaseFacts(0, (SCHEDULED,), (host_name(),))
HEALTH = "/api/v2/monitor/health"
PLUGIN = "/dstack-utilization/"


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    """Answer as a healthy API server with the plugin, and put healthy facts into the database."""
    monkeypatch.setattr(_doctor, "database_facts", lambda: FACTS)
    with health_server() as http:
        http.replies = {HEALTH: (200, json.dumps(HEALTHY)), PLUGIN: (200, "")}
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", http.url)
        yield http


def states(reply_seconds: float | None = 0.1) -> dict[str, str]:
    return {each.check: each.state for each in airflow_findings(reply_seconds)}


def found(check: str, reply_seconds: float | None = 0.1) -> Finding:
    findings = list(airflow_findings(reply_seconds))
    for each in findings:
        assert bool(each.advice) == (each.state in ("warning", "error")), each
    return next(each for each in findings if each.check == check)


def plant(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    monkeypatch.setattr(_doctor, "database_facts", lambda: FACTS._replace(**changed))


@pytest.mark.usefixtures("airflow")
def test_nothing_is_wrong() -> None:
    assert states() == dict.fromkeys(
        (
            "Airflow provider",
            "Airflow scheduler",
            "Airflow dag_processor",
            "Airflow plugin",
            "Airflow kill grace",
            "Airflow triggerer",
            "Airflow reaper",
            "Airflow deferred logs",
        ),
        "ok",
    )


@pytest.mark.usefixtures("airflow")
def test_the_provider_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "entry_points", lambda group: EntryPoints())
    assert found("Airflow provider").state == "error"
    assert "pip install airflow-provider-dstack" in found("Airflow provider").advice


@pytest.mark.parametrize("part", ["scheduler", "dag_processor"])
def test_a_component_does_not_run(airflow: HealthServer, part: str) -> None:
    airflow.replies[HEALTH] = (200, json.dumps({**HEALTHY, part: {"status": "unhealthy"}}))
    assert f"airflow {part.replace('_', '-')}" in found(f"Airflow {part}").advice
    airflow.replies[HEALTH] = (200, json.dumps({**HEALTHY, part: {"status": None}}))
    assert "not running" in found(f"Airflow {part}").text


def test_the_api_server_lacks_the_plugin(airflow: HealthServer) -> None:
    airflow.replies[PLUGIN] = (404, "")
    assert found("Airflow plugin").state == "warning"
    assert "restart it" in found("Airflow plugin").advice


@pytest.mark.usefixtures("airflow")
def test_the_api_server_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", f"http://127.0.0.1:{free_port()}")
    assert "base_url" in found("Airflow").advice
    # What the database has is still checked.
    assert states()["Airflow reaper"] == "ok"
    assert "Airflow triggerer" not in states()


def test_no_triggerer_is_alive(airflow: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    airflow.replies[HEALTH] = (200, json.dumps({**HEALTHY, "triggerer": {"status": "unhealthy"}}))
    assert found("Airflow triggerer").state == "warning"
    plant(monkeypatch, deferred=3)
    assert found("Airflow triggerer").state == "error"
    assert "3 deferred dstack tasks wait for it" in found("Airflow triggerer").text
    plant(monkeypatch, deferred=0)
    monkeypatch.setenv("AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE", "True")
    assert found("Airflow triggerer").state == "error"
    assert found("Airflow triggerer").advice == "Start it: airflow triggerer"


@pytest.mark.usefixtures("airflow")
@pytest.mark.parametrize(
    ("reapers", "words"),
    [
        ((), "cron"),
        ((SCHEDULED._replace(is_paused=True),), "airflow dags unpause reap"),
        ((SCHEDULED._replace(is_scheduled=False),), "has no schedule"),
        ((SCHEDULED._replace(last_state="failed"),), "in DAG reap failed"),
    ],
)
def test_no_reaper_works(
    monkeypatch: pytest.MonkeyPatch, reapers: tuple[ReaperFacts, ...], words: str
) -> None:
    plant(monkeypatch, reapers=reapers)
    finding = found("Airflow reaper")
    assert finding.state == "warning"
    assert words in f"{finding.text} {finding.advice}"


@pytest.mark.usefixtures("airflow")
def test_deferred_log_lines_would_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, triggerer_hosts=(host_name(), "triggerer-1"))
    finding = found("Airflow deferred logs")
    assert (finding.state, "triggerers run on triggerer-1" in finding.text) == ("warning", True)
    assert "remote_logging" in finding.advice
    monkeypatch.setenv("AIRFLOW__LOGGING__REMOTE_LOGGING", "True")
    monkeypatch.setenv("AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER", "")
    assert "remote_base_log_folder" in found("Airflow deferred logs").text
    monkeypatch.setenv("AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER", "s3://bucket/logs")
    assert found("Airflow deferred logs").state == "ok"
    monkeypatch.setenv("AIRFLOW__LOGGING__REMOTE_LOGGING", "False")
    plant(monkeypatch, triggerer_hosts=())
    assert found("Airflow deferred logs").state == "skipped"


@pytest.mark.usefixtures("airflow")
def test_a_log_that_is_relayed_again_does_not_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DSTACK__RELAY_LOG_AGAIN", "True")
    plant(monkeypatch, triggerer_hosts=(host_name(), "triggerer-1"))
    assert found("Airflow deferred logs").state == "ok"
    plant(monkeypatch, triggerer_hosts=(host_name(),))
    finding = found("Airflow deferred logs")
    assert (finding.state, "appears twice" in finding.text) == ("warning", True)


@pytest.mark.usefixtures("airflow")
def test_a_stop_does_not_fit_into_the_kill_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "took 2.5 s for a reply" in found("Airflow kill grace", 2.5).text
    assert "DstackReapOperator" in found("Airflow kill grace", 2.5).advice
    assert "Airflow kill grace" not in states(None)
    monkeypatch.setenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", "3")
    assert "killed_task_cleanup_time is 3 s" in found("Airflow kill grace").text


@pytest.mark.usefixtures("airflow")
def test_the_database_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_database() -> DatabaseFacts:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(_doctor, "database_facts", no_database)
    assert "scheduler or API server runs" in found("Airflow database").advice


def _change(session: Any, dag_id: str, **fields: object) -> None:
    dag = session.get(DagModel, dag_id)
    for name, value in fields.items():
        setattr(dag, name, value)


def test_the_database_has_reapers_deferred_tasks_and_triggerers(dag_runner: DagRunner, server: Any) -> None:
    # The tests of a process share its database, and some leave a deferred task.
    others = database_facts().deferred
    ran = dag_runner.run_tasks("DstackReapOperator(task_id='reap', min_age=600)\n")
    assert ran.tasks == {"reap": "success"}
    with create_session() as session:
        _change(session, ran.dag_id, is_stale=False, is_paused=False, timetable_summary="0:15:00")
    (reaper,) = [each for each in database_facts().reapers if each.dag_id == ran.dag_id]
    assert reaper == ReaperFacts(ran.dag_id, False, True, "success")
    with create_session() as session:
        _change(session, ran.dag_id, is_paused=True, timetable_summary="None")
        trigger = Trigger("airflow_provider_dstack.triggers.DstackRunTrigger", {})
        job: Any = Job(job_type="TriggererJob", state="running")  # type: ignore[no-untyped-call]  # Airflow's
        job.hostname, job.latest_heartbeat = "triggerer-7", datetime.now(UTC)
        session.add_all([trigger, job])
        session.flush()
        ti = session.query(TaskInstance).filter(TaskInstance.dag_id == ran.dag_id).one()
        ti.trigger_id = trigger.id
        job_id = job.id
    facts = database_facts()
    assert facts.deferred == others + 1
    assert "triggerer-7" in facts.triggerer_hosts
    (reaper,) = [each for each in facts.reapers if each.dag_id == ran.dag_id]
    assert (reaper.is_paused, reaper.is_scheduled) == (True, False)
    with create_session() as session:
        ti = session.query(TaskInstance).filter(TaskInstance.dag_id == ran.dag_id).one()
        ti.trigger_id = None
        _change(session, ran.dag_id, is_stale=True)
        session.delete(session.get(Job, job_id))
    facts = database_facts()
    assert (facts.deferred, "triggerer-7" in facts.triggerer_hosts) == (others, False)
    assert ran.dag_id not in {each.dag_id for each in facts.reapers}


@pytest.mark.parametrize("command", ["ps", "cost"])
def test_a_dstack_server_that_is_away_is_an_error_within_seconds(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {
        "conn_type": "dstack",
        "host": f"http://127.0.0.1:{free_port()}",
        "login": "main",
        "password": "secret",
    }
    monkeypatch.setenv("AIRFLOW_CONN_AWAY", json.dumps(connection))
    options = {"all": False, "every": False, "by": "owner", "since": None, "until": None}
    args = Namespace(conn_id="away", project=None, output="text", dag=None, csv=False, **options)
    started = time.monotonic()
    with pytest.raises(ServerUnreachableError):
        getattr(_commands, command)(args)
    # The retry budget of a task is 30 s and more.
    assert time.monotonic() - started < 20
