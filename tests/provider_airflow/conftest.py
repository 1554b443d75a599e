"""Give the tests their own Airflow: nothing outside a temporary directory is read or written."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HOME = Path(tempfile.mkdtemp(prefix="airflow-home-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

# Airflow reads its environment when it is imported, so this comes first.
DATABASE = os.environ.get("AIRFLOW_TEST_DATABASE", "sqlite")
for _name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
    del os.environ[_name]
os.environ.update(
    {
        "AIRFLOW_HOME": str(HOME),
        "AIRFLOW__CORE__DAGS_FOLDER": str(HOME / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__FERNET_KEY": "",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{HOME}/airflow.db",
    }
)

from airflow_provider_dstack._kill_reason import KillReason  # noqa: E402
from dstack_core.local import LocalServer  # noqa: E402
from tests.callback_journal import VARIABLE  # noqa: E402
from tests.postgres import PostgresMissing, postgres_url  # noqa: E402
from tests.provider_airflow.components import Components  # noqa: E402
from tests.provider_airflow.databases import DATABASE_URL, migrate  # noqa: E402
from tests.provider_airflow.fleet import Fleet, running_fleet  # noqa: E402
from tests.provider_airflow.redis_server import RedisMissing  # noqa: E402
from tests.provider_airflow.support import DagRunner, connection_json  # noqa: E402
from tests.rig.fixtures import real_server  # noqa: E402
from tests.rig.server import RealServer  # noqa: E402

if TYPE_CHECKING:
    from tests.provider_airflow.fleet_tasks import Working

__all__ = ["real_server"]


_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def database() -> Path:
    """Return a migrated database file that nothing has been written to."""
    (HOME / "dags").mkdir(exist_ok=True)
    migrate(os.environ[DATABASE_URL], HOME)
    fresh = HOME / "fresh.db"
    shutil.copy(HOME / "airflow.db", fresh)
    return fresh


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Run an embedded dstack server, and define ``dstack_default`` as its connection."""
    with LocalServer(stop_grace_seconds=2.0) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        yield server


@pytest.fixture
def ended_by_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Airflow report, when a task is killed, that a user has ended it."""
    ended = KillReason("ended", "the task's state is failed")
    monkeypatch.setattr("airflow_provider_dstack._kill_reason.kill_reason", lambda ask_state: ended)


@pytest.fixture
def real(real_server: RealServer, monkeypatch: pytest.MonkeyPatch) -> RealServer:
    """Let ``dstack_default`` connect to a real dstack server."""
    monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(real_server))
    return real_server


@pytest.fixture
def dag_runner(database: Path, monkeypatch: pytest.MonkeyPatch) -> DagRunner:
    """Return a runner of DAG files that uses ``dag.test()``.

    It has no scheduler that a trigger's event could overtake: triggers do not hold the event back for seconds.
    """
    monkeypatch.setattr("airflow_provider_dstack.triggers._LONGEST_HOLD_SECONDS", 0.0)
    return DagRunner(HOME / "dags")


@pytest.fixture(scope="session")
def shared_server() -> Iterator[LocalServer]:
    """Run an embedded dstack server for the real components; its GPUs are busy after two seconds."""

    def usage(seconds: float) -> tuple[float, float]:
        return (0.0 if seconds < 2 else 62.0 + 25 * math.sin(seconds)), min(11.0, seconds * 2)

    with LocalServer(stop_grace_seconds=2.0, metrics_seconds=0.5, gpu_usage=usage) as server:
        yield server


@pytest.fixture(scope="session")
def components(
    shared_server: LocalServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Components]:
    """Run api-server, scheduler, dag-processor and triggerer as processes of their own."""
    yield from run_components(shared_server, tmp_path_factory.mktemp("components"), request)


@pytest.fixture(scope="module")
def patient_components(
    shared_server: LocalServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Components]:
    """Run the components with a scheduler that waits 900 s for a task's or another scheduler's heartbeat."""
    yield from run_components(
        shared_server,
        tmp_path_factory.mktemp("patient-components"),
        request,
        AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT="900",
        AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD="900",
    )


@pytest.fixture(scope="session")
def real_components(
    real_server: RealServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Components]:
    """Run the components with a real dstack server."""
    yield from run_components(real_server, tmp_path_factory.mktemp("real-components"), request)


@pytest.fixture(scope="module")
def pods(
    shared_server: LocalServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Components]:
    """Run the components with an executor that runs the command of KubernetesExecutor's pods."""
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from tests.provider_airflow import pod_executor

    home = tmp_path_factory.mktemp("pods")
    yield from run_components(
        shared_server,
        home,
        request,
        AIRFLOW__CORE__EXECUTOR=f"{pod_executor.__name__}.{pod_executor.PodExecutor.__name__}",
        **{pod_executor.PODS: str(home)},
    )


@contextlib.contextmanager
def _migrated(home: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of a migrated database: sqlite, or Postgres if ``AIRFLOW_TEST_DATABASE`` names it."""
    if DATABASE == "postgres":
        with postgres_url() as url:
            migrate(url, home)
            yield url
    elif DATABASE == "sqlite":
        copy = home / "airflow.db"
        shutil.copy(request.getfixturevalue("database"), copy)
        yield f"sqlite:///{copy}"
    else:
        raise ValueError(f"AIRFLOW_TEST_DATABASE: expected 'sqlite' or 'postgres', got {DATABASE!r}.")


def run_components(
    server: LocalServer | RealServer, home: Path, request: pytest.FixtureRequest, **settings: str
) -> Iterator[Components]:
    """Run the components in ``home`` with ``server`` as their dstack; ``settings`` are for the environment."""
    shutil.copytree(Path(__file__).parent / "dags", home / "dags")
    with _migrated(home, request) as url:
        environment = {
            "AIRFLOW_CONN_DSTACK_DEFAULT": connection_json(server),
            VARIABLE: str(home / "callbacks"),
            # DAGs import helpers of the tests.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            **settings,
        }
        started = Components(home, url, environment)
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture
def wrong_connections(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """Define connections with one wrong value each: ``bad_token``, ``bad_project``, ``bad_url``."""
    good = json.loads(connection_json(server))
    changes: dict[str, dict[str, object]] = {
        "bad_token": {"password": "not-the-token"},
        "bad_project": {"login": "nowhere"},
        "bad_url": {"host": "http://127.0.0.1:9"},
        "no_token": {"password": None},
        "no_project": {"login": None},
    }
    for name, change in changes.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps({**good, **change}))
    return server


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run Airflow with CeleryExecutor, two of each component that may be there twice, and a dstack server.

    A test that ends a component starts it again.
    """
    pytest.importorskip("airflow.providers.celery")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer(stop_grace_seconds=2.0))
        try:
            started = stack.enter_context(running_fleet(tmp_path_factory.mktemp("fleet"), server))
        except (PostgresMissing, RedisMissing) as error:
            if DATABASE == "postgres":
                raise
            pytest.skip(str(error))
        yield started


@pytest.fixture
def working(fleet: Fleet, tmp_path: Path) -> Iterator[Callable[[str], Working]]:
    """Return what starts a DAG run whose task follows its run; workers that are lost are started again."""
    from tests.provider_airflow.fleet_tasks import Working

    fleet.wait_until_healthy()
    cases: list[Working] = []

    def start(dag_id: str) -> Working:
        case = Working(fleet, fleet.dstack, tmp_path / f"gate-{dag_id}")
        cases.append(case)
        case.start_working(dag_id)
        return case

    yield start
    for case in cases:
        case.gate.touch()
    # The next test waits until they take tasks.
    for name in {case.worker for case in cases}:
        fleet.restart_with(name)
