"""Airflow's ways to end a task, on a server that is slow or drops the stop, in a real Airflow."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency import LATENCIES, LatencyCase, NotReached, Way
from tests.faults.latency_judge import LatencyResult, Seen
from tests.faults.latency_matrix import are_chosen, try_latencies
from tests.ports import free_port
from tests.provider_airflow.components import Components
from tests.provider_airflow.databases import best_database
from tests.provider_airflow.ended_tasks import (
    LOOK_EVERY,
    OVER,
    PATIENCE,
    EndedTask,
    break_off,
    clear,
    fail_dag_run,
    mark,
    terminate,
)
from tests.provider_airflow.support import connection_json, wait_for
from tests.rig.server import RealServer

_DAGS = Path(__file__).parent.parent / "provider_airflow" / "dags"
_DAG_FILE = "slow_server.py"
# The `execution_timeout` of the DAGs in slow_server.py, in seconds.
_TIMEOUT = 50.0
# Cases at once; each has a task process of its own.
_WORKERS = 8
_SETTINGS = {"AIRFLOW__CORE__PARALLELISM": str(_WORKERS + 2)}
# A task process has 5 s after its SIGTERM, which comes with the next heartbeat: within 1 s here, later on a busy
# machine.
_KILL_SECONDS = 8.0
# Elsewhere the stop may take the timeout of the connection, 30 s by default, plus a margin for a busy machine.
_STOP_SECONDS = 45.0
# A real server takes seconds to start a run, so only a few cases are tried there.
_REALLY = ("marked failed", "execution_timeout", "marked failed, deferred")
_REALLY_SLOW = [one for one in LATENCIES if one.whole or one.drops is None or one.longest == 2.5]


@dataclass(frozen=True)
class Ways:
    """All ways to end a task in one Airflow; ``folder`` is for the gates."""

    airflow: Components
    folder: Path
    # On sqlite, Airflow fails a request that writes while another one writes.
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> Mapping[str, Way]:
        """Return the ways by name."""
        sync, deferred = "slow_ended", "slow_deferred"
        failed, success = partial(mark, "failed"), partial(mark, "success")
        return {
            "marked failed": partial(self.ended, sync, failed, ["failed"]),
            "marked failed, run name chosen": partial(self.ended, "slow_named", failed, ["failed"]),
            "marked success": partial(self.ended, sync, success, ["success"]),
            "cleared": partial(self.ended, sync, clear, []),
            # When a DAG run is marked failed, Airflow leaves its unfinished tasks skipped or failed.
            "DAG run failed": partial(self.ended, sync, fail_dag_run, ["failed", "skipped"]),
            "worker SIGTERM, last try": partial(self.ended, "slow_last_try", terminate, ["failed"]),
            "exception, last try": partial(
                self.ended, "slow_last_try", break_off, ["failed"], limit=_STOP_SECONDS + 30
            ),
            "execution_timeout": partial(self.timed_out, "slow_timed_out"),
            "marked failed, deferred": partial(self.ended, deferred, failed, ["failed"]),
            "marked success, deferred": partial(self.ended, deferred, success, ["success"]),
            "cleared, deferred": partial(self.ended, deferred, clear, []),
            "DAG run failed, deferred": partial(self.ended, deferred, fail_dag_run, ["failed", "skipped"]),
            "execution_timeout, deferred": partial(self.timed_out, "slow_deferred_timed_out"),
            "teardown": self.torn_down,
        }

    def reap(self, server: LocalServer | RealServer | None = None) -> None:
        """Let Airflow's command stop what is left, on ``server`` or that of the default connection."""
        name = "dstack_default"
        if server is not None:
            name = "reaped"
            self._connect(name, server, server.url)
        # The service's task succeeded. Without its teardown, only this option stops the service.
        done = self.airflow.command("dstack", "reap", "--min-age", "0", "--stop-services", "--conn-id", name)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def ended(
        self,
        dag_id: str,
        end: Callable[[EndedTask], None],
        expected: list[str],
        case: LatencyCase,
        *,
        limit: float | None = None,
    ) -> Seen:
        """End a task whose run is running."""
        is_deferred = dag_id == "slow_deferred"
        task, run = self._running(dag_id, case, is_deferred=is_deferred)
        process = None if is_deferred else task.process()
        # Open the gate, so that the run of a next try, if there is one, ends at once.
        (self.folder / case.name).touch()
        case.begin()
        with self._writing:
            end(task)
        case.caused()
        case.watch(run, limit or (_STOP_SECONDS if is_deferred else _KILL_SECONDS))
        if process is not None:
            wait_for("end of the task's process", lambda: not process.is_running(), PATIENCE, LOOK_EVERY)
        if end is clear:
            # The next try stops the run of the try before, and fails if it cannot.
            task.wait_for("success", "failed")
            expected = ["success" if case.is_stopped() else "failed"]
        task.wait_for(*OVER)
        task.wait_until_quiet()
        return Seen(task.state, expected, task.said())

    def timed_out(self, dag_id: str, case: LatencyCase) -> Seen:
        """Let a task exceed its `execution_timeout`; the fault begins when its run is running."""
        is_deferred = dag_id == "slow_deferred_timed_out"
        task, run = self._running(dag_id, case, is_deferred=is_deferred)
        case.begin()
        started = datetime.fromisoformat(task.now()["start_date"])
        left = _TIMEOUT - (datetime.now(UTC) - started).total_seconds()
        if left < 5:
            raise NotReached("expected a running run before the timeout, got one too late")
        case.caused_at = time.monotonic() + left
        case.watch(run, _STOP_SECONDS)
        task.wait_for(*OVER)
        task.wait_until_quiet()
        return Seen(task.state, ["failed"], task.said())

    def torn_down(self, case: LatencyCase) -> Seen:
        """Let the teardown of a DAG run stop the service that its setup started."""
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
            PATIENCE,
            LOOK_EVERY,
        )
        case.begin()
        (self.folder / case.name).touch()
        task.wait_for("running", *OVER)
        case.caused()
        case.watch(run, _STOP_SECONDS)
        task.wait_for(*OVER)
        task.wait_until_quiet()
        # A teardown that could not stop its run must fail.
        return Seen(task.state, ["success" if case.is_stopped() else "failed"], task.said())

    def _running(self, dag_id: str, case: LatencyCase, *, is_deferred: bool) -> tuple[EndedTask, dstack.Run]:
        gate = self.folder / case.name
        task = self._started(dag_id, case, {"type": "task", "commands": [f"[ -e {gate} ] || sleep 7200"]})
        run = task.running()
        if is_deferred:
            task.wait_for("deferred")
            self._wait_for_trigger(task)
        return task, run

    def _started(self, dag_id: str, case: LatencyCase, configuration: dict[str, Any]) -> EndedTask:
        with self._writing:
            self._connect(case.name, case.server, case.url)
            try:
                dag_run = self.airflow.trigger(
                    dag_id,
                    connection=case.name,
                    configuration=json.dumps(configuration),
                    name=case.name,
                    gate=str(self.folder / case.name),
                )
            except AssertionError as error:
                if "Database error" in str(error):
                    raise NotReached(f"expected a DAG run, got {error}") from error
                raise
        return EndedTask(self.airflow, case, dag_id, dag_run)

    def _connect(self, name: str, server: LocalServer | RealServer, url: str) -> None:
        connection = json.loads(connection_json(server)) | {"host": url, "connection_id": name}
        self.airflow.call("POST", "/api/v2/connections", connection)

    def _wait_for_trigger(self, task: EndedTask) -> None:
        """Wait until a triggerer follows the run: until then no process can notice that the task is ended."""
        moment = time.monotonic()

        def polls() -> bool:
            if task.state in OVER:
                raise NotReached(f"expected a deferred task, got one that is {task.state}")
            return sum(one.time > moment for one in task.case.proxy.requests) > 2

        wait_for("polls by the trigger", polls, PATIENCE, LOOK_EVERY)


@contextmanager
def host(server: LocalServer) -> Iterator[Ways]:
    """Run a private Airflow; what has no connection of its own uses ``server`` without a proxy."""
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
    """Return the results of all ways, and of some of them on a real server."""
    with LocalServer(stop_grace_seconds=2.0) as server, host(server) as ways:
        results = try_latencies(server, ways.all(), ways.reap, only=only, workers=_WORKERS)
        real = {f"{name}, real server": ways.all()[name] for name in _REALLY}
        if are_chosen(real, _REALLY_SLOW, only):
            with RealServer(images=True) as upstream:
                results += try_latencies(
                    upstream,
                    real,
                    lambda: ways.reap(upstream),
                    only=only,
                    faults=_REALLY_SLOW,
                    workers=_WORKERS,
                )
    return results
