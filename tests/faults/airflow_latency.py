"""Airflow's ways to end a task, on a server that is slow or drops the stop; a real Airflow does them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency import LatencyCase, NotReached, Way
from tests.faults.latency_judge import LatencyResult, Said, Seen
from tests.faults.latency_matrix import try_latencies
from tests.ports import free_port
from tests.provider_airflow.components import Components
from tests.provider_airflow.databases import best_database
from tests.provider_airflow.support import connection_json, wait_for

_DAGS = Path(__file__).parent.parent / "provider_airflow" / "dags"
_DAG_FILE = "slow_server.py"
_TIMEOUT = 50.0
_WORKERS = 8
_SETTINGS = {"AIRFLOW__CORE__PARALLELISM": str(_WORKERS + 2)}
# A task process has 5 s after its SIGTERM, which comes with the next heartbeat: 1 s here, more on a busy machine.
_KILL_SECONDS = 8.0
# Everywhere else the stop has the timeout of the connection, which is 30 s by default.
_STOP_SECONDS = 45.0
_LOOK_EVERY = 0.5
# No request for that long: whoever stopped the run is done with it.
_QUIET_SECONDS = 6.0
_PATIENCE = 240.0
_OVER = ("success", "failed", "skipped", "up_for_retry", "removed")


@dataclass(frozen=True)
class Task:
    """The task ``train`` of one DAG run, and the case it belongs to."""

    airflow: Components
    case: LatencyCase
    dag_id: str
    dag_run: str

    @property
    def state(self) -> str:
        return str(self.now()["state"])

    def now(self) -> dict[str, Any]:
        return self.airflow.task(self.dag_id, self.dag_run)

    def wait_for(self, *states: str) -> None:
        self.airflow.wait_for_state(self.dag_id, self.dag_run, *states, seconds=_PATIENCE)

    def running(self, task_id: str = "train") -> dstack.Run:
        """Return the run of this DAG run's task once it is running."""
        marker = f"airflow:{self.dag_id}/{self.dag_run}/{task_id}/"

        def find() -> dstack.Run | None:
            # A task that is over will have no run any more.
            if task_id == "train" and self.state in _OVER:
                raise NotReached(f"expected a running task, got {self.state}")
            active = self.case.client.runs.list()
            return next((run for run in active if (run.marker or "").startswith(marker)), None)

        return self.case.wait_for_run(find)

    def process(self) -> psutil.Process:
        return psutil.Process(self.now()["pid"])

    def said(self) -> list[Said]:
        """Return the records of all tries' logs."""
        tries = range(1, self.now()["try_number"] + 1)
        return [_said(one) for number in tries for one in self.airflow.log(self.dag_id, self.dag_run, number)]

    def wait_until_quiet(self) -> None:
        """Return once nobody asks the server for anything any more."""
        proxy = self.case.proxy

        def is_quiet() -> bool:
            last = proxy.requests[-1].time if proxy.requests else 0.0
            return proxy.is_idle and time.monotonic() - last > _QUIET_SECONDS

        wait_for("quiet server", is_quiet, _PATIENCE, _LOOK_EVERY)


@dataclass(frozen=True)
class Ways:
    """All ways, done by one Airflow; ``folder`` is for the gates."""

    airflow: Components
    folder: Path

    def all(self) -> Mapping[str, Way]:
        """Return the ways by name."""
        sync, deferred = "slow_ended", "slow_deferred"
        failed, success = partial(_mark, "failed"), partial(_mark, "success")
        return {
            "marked failed": partial(self.ended, sync, failed, ["failed"]),
            "marked failed, run name chosen": partial(self.ended, "slow_named", failed, ["failed"]),
            "marked success": partial(self.ended, sync, success, ["success"]),
            "cleared": partial(self.ended, sync, _clear, ["success"]),
            # Airflow leaves the unfinished tasks of a DAG run that is marked failed skipped, or failed.
            "DAG run failed": partial(self.ended, sync, _fail_dag_run, ["failed", "skipped"]),
            "worker SIGTERM, last try": partial(self.ended, "slow_last_try", _terminate, ["failed"]),
            "exception, last try": partial(
                self.ended, "slow_last_try", _break, ["failed"], limit=_STOP_SECONDS + 30
            ),
            "execution_timeout": partial(self.timed_out, "slow_timed_out"),
            "deferred: marked failed": partial(self.ended, deferred, failed, ["failed"]),
            "deferred: marked success": partial(self.ended, deferred, success, ["success"]),
            "deferred: cleared": partial(self.ended, deferred, _clear, ["success"]),
            "deferred: DAG run failed": partial(self.ended, deferred, _fail_dag_run, ["failed", "skipped"]),
            "deferred: execution_timeout": partial(self.timed_out, "slow_deferred_timed_out"),
            "teardown": self.torn_down,
        }

    def ended(
        self,
        dag_id: str,
        end: Callable[[Task], None],
        expected: list[str],
        case: LatencyCase,
        *,
        limit: float | None = None,
    ) -> Seen:
        """End a task whose run is running."""
        is_deferred = dag_id == "slow_deferred"
        task, run = self._running(dag_id, case, is_deferred=is_deferred)
        process = None if is_deferred else task.process()
        # The run of a next try, if there is one, ends at once.
        (self.folder / case.name).touch()
        case.begin()
        end(task)
        case.caused()
        case.watch(run, limit or (_STOP_SECONDS if is_deferred else _KILL_SECONDS))
        if process is not None:
            wait_for("end of the task's process", lambda: not process.is_running(), _PATIENCE, _LOOK_EVERY)
        task.wait_until_quiet()
        task.wait_for(*_OVER)
        return Seen(task.state, expected, task.said())

    def timed_out(self, dag_id: str, case: LatencyCase) -> Seen:
        """Have a task run out of its `execution_timeout`; the fault begins when its run is running."""
        is_deferred = dag_id == "slow_deferred_timed_out"
        task, run = self._running(dag_id, case, is_deferred=is_deferred)
        case.begin()
        started = datetime.fromisoformat(task.now()["start_date"])
        left = _TIMEOUT - (datetime.now(UTC) - started).total_seconds()
        if left < 5:
            raise NotReached("expected a running run before the timeout, got one too late")
        case.caused_at = time.monotonic() + left
        case.watch(run, _STOP_SECONDS)
        task.wait_for(*_OVER)
        task.wait_until_quiet()
        return Seen(task.state, ["failed"], task.said())

    def torn_down(self, case: LatencyCase) -> Seen:
        """Have the teardown of a DAG run stop the service that its setup has started."""
        port = free_port()
        what = {
            "type": "service",
            "port": port,
            "commands": [f"python3 -m http.server {port} --bind 127.0.0.1"],
        }
        task = self._started("slow_teardown", case, what)
        path = f"/api/v2/dags/{task.dag_id}/dagRuns/{task.dag_run}/taskInstances"
        run = task.running("serve")
        wait_for(
            "service that answers",
            lambda: self.airflow.call("GET", f"{path}/wait")["state"] == "running",
            _PATIENCE,
            _LOOK_EVERY,
        )
        case.begin()
        (self.folder / case.name).touch()
        task.wait_for("running", *_OVER)
        case.caused()
        case.watch(run, _STOP_SECONDS)
        task.wait_for(*_OVER)
        task.wait_until_quiet()
        # A teardown that could not stop its run has failed.
        return Seen(task.state, ["success" if case.is_stopped() else "failed"], task.said())

    def _running(self, dag_id: str, case: LatencyCase, *, is_deferred: bool) -> tuple[Task, dstack.Run]:
        gate = self.folder / case.name
        task = self._started(dag_id, case, {"type": "task", "commands": [f"[ -e {gate} ] || sleep 900"]})
        run = task.running()
        if is_deferred:
            task.wait_for("deferred")
            self._wait_for_trigger(task)
        return task, run

    def _started(self, dag_id: str, case: LatencyCase, configuration: dict[str, Any]) -> Task:
        connection = json.loads(connection_json(case.server)) | {"host": case.url, "connection_id": case.name}
        self.airflow.call("POST", "/api/v2/connections", connection)
        dag_run = self.airflow.trigger(
            dag_id,
            connection=case.name,
            configuration=json.dumps(configuration),
            name=case.name,
            gate=str(self.folder / case.name),
        )
        return Task(self.airflow, case, dag_id, dag_run)

    def _wait_for_trigger(self, task: Task) -> None:
        """Return when a triggerer follows the run: until then there is nobody who could hear of an end."""
        moment = time.monotonic()
        wait_for(
            "polls by the trigger",
            lambda: sum(one.time > moment for one in task.case.proxy.requests) > 2,
            _PATIENCE,
            _LOOK_EVERY,
        )


def _mark(state: str, task: Task) -> None:
    task.airflow.set_state(task.dag_id, task.dag_run, state)


def _clear(task: Task) -> None:
    task.airflow.clear(task.dag_id, task.dag_run)


def _fail_dag_run(task: Task) -> None:
    task.airflow.set_run_state(task.dag_id, task.dag_run, "failed")


def _terminate(task: Task) -> None:
    supervisor = task.process().parent()
    assert supervisor is not None
    supervisor.terminate()


def _break(task: Task) -> None:
    task.case.proxy.answer_at_once["logs/poll"] = 503


def _said(record: Any) -> Said:
    if isinstance(record, str):
        return Said(logging.INFO, record)
    level = logging.getLevelNamesMapping().get(str(record.get("level", "info")).upper(), logging.INFO)
    return Said(level, " ".join(str(record[key]) for key in ("event", "error_detail") if record.get(key)))


@contextmanager
def host(server: LocalServer) -> Iterator[Ways]:
    """Run an Airflow of our own; what has no connection of its own uses ``server`` without a proxy."""
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="airflow-latency-"))
    try:
        (home / "dags").mkdir()
        (home / "gates").mkdir()
        shutil.copy(_DAGS / _DAG_FILE, home / "dags")
        with best_database(home) as url:
            settings = {**_SETTINGS, "AIRFLOW_CONN_DSTACK_DEFAULT": connection_json(server)}
            components = Components(home, url, settings)
            try:
                components.start()
                yield Ways(components, home / "gates")
            finally:
                components.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def try_ways(only: str) -> list[LatencyResult]:
    """Return the results of these ways."""
    with LocalServer(stop_grace_seconds=2.0) as server, host(server) as ways:
        return try_latencies(
            server,
            ways.all(),
            lambda: ways.airflow.command("dstack", "reap"),
            only=only,
            workers=_WORKERS,
        )
