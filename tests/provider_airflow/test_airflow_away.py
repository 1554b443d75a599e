"""Outages of Airflow's own parts, with its real components: they do not stop any run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from airflow_provider_dstack._compat import trigger_has_on_kill
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.postgres import Postgres, PostgresMissing, running_postgres
from tests.provider_airflow.components import Components
from tests.provider_airflow.databases import migrate
from tests.provider_airflow.slow_proxy import SlowProxy
from tests.provider_airflow.support import connection_json, over, wait_for
from tests.provider_airflow.test_kill_matrix import Case

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    # An Airflow of its own starts in a minute or two, and a supervisor takes another one to give up.
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not trigger_has_on_kill(),
        reason="before Airflow 3.3 a supervisor that cannot reach Airflow breaks and leaves its task behind",
    ),
]

_STEPS = [f"step-{number}" for number in range(1, 7)]
# The supervisor gives up after three heartbeats with five attempts each, at most 48 s apart.
_GIVES_UP_SECONDS = 180.0
# What Airflow leaves a task between SIGTERM and SIGKILL.
_KILL_SECONDS = 5.0


def has_ended(process: psutil.Process) -> bool:
    """Return whether the process has ended, even if its supervisor has not noticed yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Watched(Case):
    """A DAG run whose task watches ``run``, by ``process`` while it is not deferred."""

    run: Run
    process: psutil.Process

    def start_watching(self, dag_id: str) -> None:
        self.start(dag_id, self.gated)
        self.run = self.running()
        self.wait_for_step()
        self.process = self.task_process()

    def wait_until_given_up(self) -> None:
        wait_for("end of the task's process", lambda: has_ended(self.process), _GIVES_UP_SECONDS, 0.5)

    def kept_line(self) -> str:
        """Return the line of the task's log that explains why the run is kept."""
        found = [line for line in self.log() if "keeps running: " in line]
        assert len(found) == 1
        return found[0]

    def assert_one_run(self) -> None:
        """Assert that there is one run, and that no stop request was sent."""
        assert [one.id for one in self.runs()] == [self.run.id]
        assert self.asked("/runs/stop") == []

    def wait_for_next_try(self) -> None:
        """Return when a later try watches the run; tries that Airflow could not start do not count."""

        def watches() -> bool:
            task = self.components.task(self.dag_id, self.run_id)
            number = int(task["try_number"])
            return task["state"] == "running" and number > 1 and "step-3" in self.log(number)

        wait_for("next try that watches the run", watches, 180)

    def try_number(self) -> int:
        return int(self.components.task(self.dag_id, self.run_id)["try_number"])


@pytest.fixture(scope="module")
def outage(
    patient_components: Components, shared_server: LocalServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Watched]:
    """Let three tasks watch their runs while the API server is away, until the processes of two were ended."""
    shared_server.faults.clear()
    gates = tmp_path_factory.mktemp("gates")
    cases = {
        name: Watched(patient_components, shared_server, gates / name)
        for name in ("many_tries", "last_try", "deferred")
    }
    for name, case in cases.items():
        case.start_watching(name)
    cases["deferred"].wait("deferred")
    patient_components.kill_one("api-server")
    for name in ("many_tries", "last_try"):
        cases[name].wait_until_given_up()
    patient_components.start_one("api-server")
    patient_components.wait_until_healthy()
    return cases


def test_an_api_server_outage_leaves_the_run_to_the_next_try(outage: dict[str, Watched]) -> None:
    case = outage["many_tries"]
    assert "Airflow cannot be reached (Connection refused)" in case.kept_line()
    assert "for the task's next try" in case.kept_line()
    assert case.run.url in case.kept_line()
    case.wait_for_next_try()
    case.gate.touch()
    case.wait("success")
    assert case.steps(case.try_number()) == _STEPS
    assert case.components.result(case.dag_id, case.run_id)["run_id"] == case.run.id
    case.assert_one_run()


def test_an_api_server_outage_on_the_last_try_stops_nothing(outage: dict[str, Watched]) -> None:
    case = outage["last_try"]
    case.wait("failed")
    assert "Airflow cannot be reached (Connection refused)" in case.kept_line()
    assert "last try" in case.kept_line()
    assert case.run.url in case.kept_line()
    assert case.run.refresh().raw_status == "running"
    case.gate.touch()
    assert over(case.run).raw_status == "done"
    case.assert_one_run()


def test_an_api_server_outage_does_not_affect_a_deferred_task(outage: dict[str, Watched]) -> None:
    case = outage["deferred"]
    assert case.wait("deferred")["try_number"] == 1
    case.gate.touch()
    case.wait("success")
    assert case.steps() == _STEPS
    case.assert_one_run()


@pytest.fixture
def watched(
    patient_components: Components, shared_server: LocalServer, tmp_path: Path
) -> Callable[[str], Watched]:
    """Return what starts a DAG run and waits until its task watches its run."""
    shared_server.faults.clear()

    def watch(dag_id: str) -> Watched:
        case = Watched(patient_components, shared_server, tmp_path / f"gate-{dag_id}")
        case.start_watching(dag_id)
        return case

    return watch


def test_a_killed_scheduler_stops_nothing(
    patient_components: Components, watched: Callable[[str], Watched]
) -> None:
    cases = [watched("retried"), watched("last_try")]
    patient_components.kill_one("scheduler")
    patient_components.start_one("scheduler")
    # A new task shows that the new scheduler works.
    cases.append(watched("last_try"))
    for case in cases:
        assert case.try_number() == 1
        case.gate.touch()
        case.wait("success")
        assert case.steps() == _STEPS
        case.assert_one_run()


@pytest.mark.long
def test_a_scheduler_that_replaces_a_lost_one_stops_nothing(
    patient_components: Components, watched: Callable[[str], Watched]
) -> None:
    # It treats the lost scheduler's tasks as orphans and starts them again, even one on its last try.
    cases = [watched("retried"), watched("last_try")]
    patient_components.kill_one("scheduler")
    patient_components.start_one(
        "scheduler",
        AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD="30",
        AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL="45",
    )
    for case in cases:
        case.wait_for_next_try()
        case.gate.touch()
        case.wait("success")
        assert case.steps(attempt=2) == _STEPS
        case.assert_one_run()


@pytest.mark.parametrize("delay", [pytest.param(1.5, marks=pytest.mark.long), 2.5])
def test_a_slow_api_server_does_not_keep_the_run_of_a_task_that_a_user_ended(
    patient_components: Components,
    watched: Callable[[str], Watched],
    delay: float,
    record_property: Callable[[str, object], None],
) -> None:
    patient_components.end_one("scheduler")
    try:
        with SlowProxy(patient_components.port, delay) as proxy:
            patient_components.start_one(
                "scheduler", AIRFLOW__CORE__EXECUTION_API_SERVER_URL=f"{proxy.url}/execution/"
            )
            case = watched("last_try")
            case.mark("failed")
            # The supervisor learns of it with a heartbeat, and logs that before it sends the signal.
            wait_for("kill", lambda: any("Terminating process" in line for line in case.log()), 60)
            seconds = case.wait_for_stop(time.monotonic())
            record_property("seconds_to_stop", round(seconds, 1))
            assert seconds < _KILL_SECONDS
            assert over(case.run).raw_status == "terminated"
            patient_components.end_one("scheduler")
    finally:
        patient_components.start_one("scheduler")


@pytest.fixture(scope="module")
def restartable(
    shared_server: LocalServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Components, Postgres]]:
    """Run an Airflow whose database can be stopped."""
    home = tmp_path_factory.mktemp("restartable-components")
    shutil.copytree(Path(__file__).parent / "dags", home / "dags")
    with ExitStack() as stack:
        try:
            postgres = stack.enter_context(running_postgres())
        except PostgresMissing as error:
            pytest.skip(str(error))
        migrate(postgres.url, home)
        environment = {
            "AIRFLOW_CONN_DSTACK_DEFAULT": connection_json(shared_server),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "900",
            # How the next scheduler finds out which tasks are lost: the last one could not write it down.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "30",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "45",
        }
        components = Components(home, postgres.url, environment)
        stack.callback(components.stop)
        components.start()
        yield components, postgres


@pytest.mark.long
def test_a_database_outage_stops_nothing(
    restartable: tuple[Components, Postgres], shared_server: LocalServer, tmp_path: Path
) -> None:
    components, postgres = restartable
    shared_server.faults.clear()
    cases = [
        Watched(components, shared_server, tmp_path / name) for name in ("many_tries", "last_try", "deferred")
    ]
    for case in cases:
        case.start_watching(case.gate.name)
    with_tries, last, deferred = cases
    deferred.wait("deferred")
    postgres.stop(at_once=True)
    for case in (with_tries, last):
        case.wait_until_given_up()
    # The scheduler ends once its tasks have; without that, it may still call itself healthy.
    assert components.ended_within(120, "scheduler")
    postgres.start()
    components.start_ended()
    for case in (with_tries, last):
        assert case.run.refresh().raw_status == "running"
    for case in cases:
        case.gate.touch()
        assert over(case.run).raw_status == "done"
        # The task on its last try gets another one: the next scheduler takes it for an orphan.
        components.wait_for_state(case.dag_id, case.run_id, "success", seconds=300)
        case.assert_one_run()
    for case in (with_tries, last):
        assert "Airflow cannot be reached (its database is unhealthy)" in case.kept_line()
