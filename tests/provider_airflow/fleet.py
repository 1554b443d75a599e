"""Run Airflow as a fleet: two Celery workers, two schedulers, two triggerers, Redis and Postgres."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dstack_core.local import LocalServer
from tests.callback_journal import VARIABLE
from tests.postgres import Postgres, running_postgres
from tests.provider_airflow import fleet_host
from tests.provider_airflow.components import Components
from tests.provider_airflow.databases import migrate
from tests.provider_airflow.redis_server import Redis, running_redis
from tests.provider_airflow.support import connection_json, wait_for

_HERE = Path(__file__).parent
# With six tasks, both workers have some.
_SLOTS = 5
# A task counts as lost once its supervisor has sent no heartbeat for so long; a busy machine needs half of that.
HEARTBEAT_SECONDS = 60
# As above, for schedulers.
_HEALTH_SECONDS = 30
# As above, for triggerers. One that gets no CPU time for so long loses its triggers to the other and lives on:
# until it notices, both relay.
_TRIGGERER_HEALTH_SECONDS = 90
_SETTINGS = {
    "CELERY__SYNC_PARALLELISM": "1",
    "CELERY__WORKER_CONCURRENCY": str(_SLOTS),
    "CORE__EXECUTOR": "CeleryExecutor",
    "CORE__HOSTNAME_CALLABLE": f"{fleet_host.__name__}.{fleet_host.address.__name__}",
    "CORE__PARALLELISM": "200",
    "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
    "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": str(_HEALTH_SECONDS),
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(HEARTBEAT_SECONDS),
    # Both triggerers get their share.
    "TRIGGERER__MAX_TRIGGER_TO_SELECT_PER_LOOP": "5",
    "TRIGGERER__RUNNER_HEALTH_CHECK_THRESHOLD": str(_TRIGGERER_HEALTH_SECONDS),
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": str(_TRIGGERER_HEALTH_SECONDS),
    "WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
}

# The marks of a file whose cases take minutes on a fleet.
LONG_FLEET_TEST = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.long,
    pytest.mark.fleet,
    pytest.mark.timeout(1800),
]


class Fleet(Components):
    """The components of a fleet; ``dstack`` is the server of its runs."""

    names = (
        *("api-server", "scheduler", "scheduler-2", "dag-processor"),
        *("triggerer", "triggerer-2", "worker", "worker-2"),
    )
    slots = 2 * _SLOTS

    def __init__(self, home: Path, dstack: LocalServer, postgres: Postgres, redis: Redis) -> None:
        self.dstack, self.postgres, self.redis = dstack, postgres, redis
        settings = {
            **_SETTINGS,
            "CELERY__BROKER_URL": redis.url,
            "CELERY__RESULT_BACKEND": f"db+{postgres.url}",
        }
        super().__init__(
            home,
            postgres.url,
            {
                "AIRFLOW_CONN_DSTACK_DEFAULT": connection_json(dstack),
                VARIABLE: str(home / "callbacks"),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(_HERE.parents[1]), os.environ.get("PYTHONPATH")])
                ),
                **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            },
        )

    def _arguments(self, name: str, kind: str) -> list[str]:
        return ["celery", "worker", "--celery-hostname", name] if kind == "worker" else [kind]

    def wait_until_healthy(self) -> None:
        """Return when Airflow reports all components as healthy, and the workers take tasks."""
        super().wait_until_healthy()
        for name in [name for name in self._processes if name.startswith("worker")]:
            self.wait_for_worker(name)

    def wait_for_worker(self, name: str) -> None:
        """Return when a worker takes tasks."""

        def is_ready() -> bool:
            assert self.is_alive(name), f"{name} ended: {self.output(name)[-3000:]}"
            return f"celery@{name} ready." in self.output(name) or f"{name} ready." in self.output(name)

        wait_for(f"ready {name}", is_ready, 180)

    def start_one(self, name: str, **settings: str) -> None:
        """Start one component; the output of an earlier one of that name is put aside."""
        output = self.home / f"{name}.out"
        if output.exists():
            output.rename(self.home / f"{name}.{time.monotonic_ns()}.out")
        super().start_one(name, **{fleet_host.VARIABLE: self.host_of(name), **settings})

    def processes(self, name: str) -> list[psutil.Process]:
        """Return all processes of a component, those of its tasks included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.pid_of(name))
            return [main, *main.children(recursive=True)]
        return []

    def lose(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all processes of a component, those of its tasks included, as a machine that goes down."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def restart(self, *names: str) -> None:
        """End what is left of components, and start them again; return when all are healthy."""
        for name in names:
            self.restart_with(name)
        self.wait_until_healthy()

    def restart_with(self, name: str, **settings: str) -> None:
        """End what is left of a component, and start it with other settings."""
        if name in self._processes:
            if self.is_alive(name):
                self.lose(name)
            self._wait_for_end(name)
        self.start_one(name, **settings)

    def stop(self) -> None:
        """Kill all components: ended one after the other, a fleet takes a minute."""
        for name in list(self._processes):
            self.lose(name)
        super().stop()

    def host_of(self, name: str) -> str:
        """Return what Airflow calls the host of a component."""
        return f"127.0.0.{self.names.index(name) + 2}"

    def component_on(self, host: str | None) -> str | None:
        """Return the component that Airflow knows by its host."""
        return next((name for name in self.names if self.host_of(name) == host), None)

    def triggerers(self) -> dict[int, str]:
        """Return the names of the triggerers by the ids of their jobs, of those that have ended too."""
        jobs = self.call("GET", "/api/v2/jobs?job_type=TriggererJob&limit=100")["jobs"]
        return {job["id"]: name for job in jobs if (name := self.component_on(job["hostname"]))}

    def output(self, name: str) -> str:
        """Return what a component has written since its start."""
        return (self.home / f"{name}.out").read_text(errors="replace")


@contextmanager
def running_fleet(home: Path, dstack: LocalServer) -> Iterator[Fleet]:
    """Run a fleet in ``home``. Raises ``PostgresMissing``, ``RedisMissing``."""
    shutil.copytree(_HERE / "fleet_dags", home / "dags")
    for name in ("kills", "reaper"):
        shutil.copy(_HERE / "dags" / f"{name}.py", home / "dags")
    with running_redis() as redis, running_postgres() as postgres:
        migrate(postgres.url, home)
        fleet = Fleet(home, dstack, postgres, redis)
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()
