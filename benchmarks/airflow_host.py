"""Inside a real Airflow: the overhead of a run, log relay and its delay, and how soon a killed task stops its run.

Run it with the Python of an Airflow environment. It starts api-server, scheduler, dag-processor and triggerer,
and an embedded dstack server, and ends them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import Row, Section, cli
from benchmarks.waiting import until
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import connection_json, runs_of

DAGS = Path(__file__).parent / "dags"
RELAY_INTERVAL = 2.0
TICKS = 300
CANCEL_LIMIT = 1.0
_LINE_BYTES = 101
_TRIGGER_SECONDS = 6.0
_ENDED = ("success", "failed")


class Host:
    """A running Airflow and its dstack server."""

    def __init__(self, airflow: Components, server: LocalServer, folder: Path) -> None:
        self.airflow = airflow
        self.server = server
        self.folder = folder

    def run(self, dag_id: str, **params: Any) -> tuple[str, dict[str, Any]]:
        """Run a DAG to its end; return its run id and task instance."""
        run_id = self.airflow.trigger(dag_id, **params)
        ended = self.airflow.wait_for_state(dag_id, run_id, *_ENDED, seconds=300)
        if ended["state"] != "success":
            raise RuntimeError(
                f"{dag_id} ended as {ended['state']}: {self.airflow.log_lines(dag_id, run_id)[-20:]}"
            )
        return run_id, ended

    def records(self, dag_id: str, run_id: str) -> Iterator[tuple[datetime, str]]:
        """Yield the time and the text of each record in the task's log."""
        for record in self.airflow.log(dag_id, run_id):
            if isinstance(record, dict) and record.get("timestamp"):
                yield datetime.fromisoformat(record["timestamp"]), str(record.get("event", ""))

    def requests(self, ending: str) -> list[float]:
        """Return the times of the requests whose path has this ending."""
        return [request.time for request in self.server.requests if request.path.endswith(ending)]


@contextmanager
def airflow_with_dstack() -> Iterator[Host]:
    """Start everything in a temporary directory, and end it."""
    with tempfile.TemporaryDirectory(prefix="dstack-bench-") as name, LocalServer() as server:
        home = Path(name)
        shutil.copytree(DAGS, home / "dags")
        for variable in [name for name in os.environ if name.startswith("AIRFLOW_")]:
            del os.environ[variable]
        os.environ["AIRFLOW_HOME"] = name
        url = f"sqlite:///{home}/airflow.db"
        database = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url}
        airflow = Path(sys.executable).with_name("airflow")
        subprocess.run(
            [airflow, "db", "migrate"], check=True, capture_output=True, env={**os.environ, **database}
        )
        environment = {
            "AIRFLOW_CONN_DSTACK_DEFAULT": connection_json(server),
            # The DAGs import from here.
            "PYTHONPATH": os.pathsep.join([str(DAGS.parent.parent), *_python_path()]),
        }
        components = Components(home, url, environment)
        try:
            components.start()
            yield Host(components, server, home)
        finally:
            components.stop()


def _python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [given] if given else []


def durations(host: Host, dag_id: str, rounds: int) -> tuple[float, float]:
    """Return the median seconds of the task and of the whole DAG run, from queued to ended."""
    tasks, whole = [], []
    for _ in range(rounds):
        run_id, task = host.run(dag_id)
        tasks.append(float(task["duration"] or 0.0))
        dag_run = until(lambda: _ended(host, dag_id, run_id), 120)  # noqa: B023 - called at once
        moments = [datetime.fromisoformat(dag_run[key]) for key in ("queued_at", "end_date")]
        whole.append((moments[1] - moments[0]).total_seconds())
    return median(tasks), median(whole)


def _ended(host: Host, dag_id: str, run_id: str) -> dict[str, Any] | None:
    found: dict[str, Any] = host.airflow.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")
    return found if found["end_date"] else None


def overhead(host: Host, section: Section, rounds: int) -> None:
    """Compare runs that do nothing with tasks that do nothing."""
    names = ("empty_operator", "empty_task", "nothing_sync", "nothing_deferred")
    spent = {name: durations(host, name, rounds) for name in names}
    empty_task, empty_run = spent["empty_task"]
    for name, what in (("nothing_sync", "Airflow, sync"), ("nothing_deferred", "Airflow, deferred")):
        task, whole = spent[name]
        section.rows.append(
            Row(
                f"a 0 s run on the embedded server, {what}",
                f"task {task:.2f} s, DAG run {whole:.2f} s",
                f"empty task: task {empty_task:.2f} s, DAG run {empty_run:.2f} s; EmptyOperator, which no worker "
                f"runs: DAG run {spent['empty_operator'][1]:.2f} s",
                f"+{task - empty_task:.2f} s",
            )
        )


def relay(host: Host, section: Section, lines: int) -> None:
    """Compare how many lines reach the task's log per second."""
    rates = {}
    for dag_id in ("logging_task", "speaking_sync", "speaking_deferred"):
        run_id, _ = host.run(dag_id, lines=lines)
        times = [(at, text.count("line-")) for at, text in host.records(dag_id, run_id) if "line-" in text]
        found = sum(number for _, number in times)
        if found != lines:
            raise RuntimeError(f"{dag_id}: {found} of {lines} lines in the task's log")
        rates[dag_id] = lines / max((times[-1][0] - times[0][0]).total_seconds(), 0.001)
    base = rates["logging_task"]
    for dag_id, what in (("speaking_sync", "sync"), ("speaking_deferred", "deferred")):
        rate = rates[dag_id]
        section.rows.append(
            Row(
                f"log relay into an Airflow task log, {what}",
                f"{rate:,.0f} lines/s, {rate * _LINE_BYTES / 1e6:.2f} MB/s",
                f"the host's own limit, a task that logs line by line: {base:,.0f} lines/s, "
                f"{base * _LINE_BYTES / 1e6:.2f} MB/s",
                f"{rate / base:.1f}",
            )
        )
    section.notes.append(
        f"Airflow log relay: {lines:,} lines of {_LINE_BYTES} bytes. While its run is active, a deferred task relays "
        "at most 100 kB/s after a burst of 500 kB, because all records of a triggerer go through one process that "
        "needs about a second of CPU per megabyte. Once the run has ended, the resumed task relays the rest on its worker."
    )


def end_of_log(host: Host, section: Section, lines: int) -> None:
    """Compare how long a deferred task takes to end after its run, when the log is long and its trigger is behind."""

    def seconds(dag_id: str) -> float:
        run_id, task = host.run(dag_id, lines=lines)
        found = sum(text.count("line-") for _, text in host.records(dag_id, run_id))
        if found != lines:
            raise RuntimeError(f"{dag_id}: {found} of {lines} lines in the task's log")
        (run,) = runs_of(host.server, f"airflow:{dag_id}/{run_id}/")
        outcome = run.outcome()
        if outcome is None or outcome.duration is None:
            raise RuntimeError(f"{dag_id}: its run has no duration")
        ended = run.submitted_at.timestamp() + outcome.duration
        return datetime.fromisoformat(task["end_date"]).timestamp() - ended

    ours, waiting = seconds("speaking_deferred"), seconds("speaking_waiting")
    section.rows.append(
        Row(
            f"from the run's end to the end of its deferred task, {lines * _LINE_BYTES / 1e6:.0f} MB of log",
            f"{ours:.1f} s",
            f"a trigger that relays the whole log before it fires: {waiting:.1f} s",
            f"1/{waiting / ours:.1f}",
            "at most 1/5",
            ours * 5 <= waiting,
        )
    )


def delay(host: Host, section: Section) -> None:
    """Measure the time from the process's write to the record in the task's log."""
    for name in ("sync", "deferred"):
        run_id, _ = host.run(f"ticking_{name}")
        told = [
            (float(line.removeprefix("tick-")), at.timestamp())
            for at, text in host.records(f"ticking_{name}", run_id)
            for line in text.split("\n")
            if line.startswith("tick-")
        ]
        if len(told) != TICKS:
            raise RuntimeError(f"ticking_{name}: {len(told)} of {TICKS} lines")
        began = min(at for _, at in told)
        # Lines written before the relay started waited for Airflow, not for a poll.
        delays = sorted(at - written for written, at in told if written > began)
        if len(delays) < TICKS / 10:
            raise RuntimeError(f"ticking_{name}: the relay began when the run had almost ended")
        middle, late = delays[len(delays) // 2], delays[int(len(delays) * 0.99)]
        section.rows.append(
            Row(
                f"log delay from the process's write to the Airflow task log, {name}",
                f"p50 {middle:.2f} s, p99 {late:.2f} s; the first line, until the relay starts, "
                f"{began - told[0][0]:.1f} s",
                f"poll interval {RELAY_INTERVAL:g} s",
                f"{middle / RELAY_INTERVAL:.0%}",
                "p50 under the interval",
                middle < RELAY_INTERVAL,
            )
        )


def cancel(host: Host, section: Section, rounds: int) -> None:
    """Mark running tasks as failed; compare the time of the stop request with the time of Airflow's signal."""

    def signalled(dag_id: str, state: str, number: int) -> float:
        file = host.folder / f"{dag_id}-{number}"
        run_id = host.airflow.trigger(dag_id, file=str(file))
        host.airflow.wait_for_state(dag_id, run_id, state)
        # A trigger starts some seconds after its task has the state deferred.
        time.sleep(_TRIGGER_SECONDS)
        asked = time.monotonic()
        host.airflow.set_state(dag_id, run_id, "failed")
        return float(until(lambda: file.read_text() if file.exists() else None, 120)) - asked

    def stopped(dag_id: str, state: str) -> float:
        submitted = len(host.requests("/runs/apply"))
        run_id = host.airflow.trigger(dag_id)
        host.airflow.wait_for_state(dag_id, run_id, state)
        until(lambda: host.requests("/runs/apply")[submitted:], 120)
        time.sleep(_TRIGGER_SECONDS)
        before, asked = len(host.requests("/runs/stop")), time.monotonic()
        host.airflow.set_state(dag_id, run_id, "failed")
        return until(lambda: host.requests("/runs/stop")[before:], 120)[0] - asked

    for name, state in (("sync", "running"), ("deferred", "deferred")):
        host_delay = median(signalled(f"signalled_{name}", state, number) for number in range(rounds))
        ours = median(stopped(f"sleeping_{name}", state) for _ in range(rounds))
        section.rows.append(
            Row(
                f"from marking the task failed to the stop request on the server, Airflow, {name}",
                f"{ours:.2f} s",
                f"`on_kill` of an empty {'trigger' if name == 'deferred' else 'operator'}: {host_delay:.2f} s",
                f"{ours - host_delay:+.2f} s",
                "under 1 s more",
                ours - host_delay < CANCEL_LIMIT,
            )
        )


def measure(quick: bool) -> Section:
    """Measure everything in one Airflow."""
    section = Section("In Airflow")
    rounds = 2 if quick else 5
    with airflow_with_dstack() as host:
        overhead(host, section, rounds)
        relay(host, section, 5_000 if quick else 20_000)
        end_of_log(host, section, 50_000 if quick else 100_000)
        delay(host, section)
        cancel(host, section, rounds)
    section.notes.append(
        "Airflow 3.3 with LocalExecutor and SQLite, one api-server worker, task heartbeat once a second. The poll "
        f"interval is 1 s, and {RELAY_INTERVAL:g} s where the log delay is measured. The times of runs that do nothing "
        f"and of stops are medians of {rounds}."
    )
    return section


if __name__ == "__main__":
    cli(measure)
