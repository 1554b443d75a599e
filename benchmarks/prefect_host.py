"""Inside a real Prefect: the overhead of a run, log relay, and how soon a cancelled flow run stops its run.

Run it with the Python of a Prefect environment. It starts a Prefect server, a process that serves flows, and an
embedded dstack server, and ends them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import requests

from benchmarks.results import Row, Section, cli
from benchmarks.waiting import until
from dstack_core.local import LocalServer
from tests.ports import free_port

CANCEL_LIMIT = 1.0
_LINE = "line-%09d-%085d"
_SPEAK = "awk 'BEGIN {{ for (i = 0; i < {}; i++) printf \"line-%09d-%085d\\n\", i, 0 }}'"


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[None]:
    """Run a Python module in a process group of its own, and end that group."""
    started = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            with suppress(subprocess.TimeoutExpired):
                started.wait(10)


@contextmanager
def prefect_with_dstack() -> Iterator[tuple[LocalServer, Path]]:
    """Start both servers; nothing outside a temporary directory is read or written."""
    with tempfile.TemporaryDirectory(prefix="dstack-bench-") as name, LocalServer() as server:
        port = free_port()
        for variable in [name for name in os.environ if name.startswith(("PREFECT_", "DSTACK_"))]:
            del os.environ[variable]
        os.environ.update(
            {
                "HOME": name,
                "PREFECT_HOME": f"{name}/.prefect",
                "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
                "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
                "DO_NOT_TRACK": "1",
                "DSTACK_SERVER_URL": server.url,
                "DSTACK_PROJECT": server.project,
                "DSTACK_TOKEN": server.token,
            }
        )
        with process("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)):
            until(lambda: _is_healthy(f"http://127.0.0.1:{port}/api/health"))
            yield server, Path(name)


def _is_healthy(url: str) -> bool:
    with suppress(requests.RequestException):
        return requests.get(url, timeout=2).ok
    return False


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def overhead_and_relay(section: Section, rounds: int, lines: int) -> None:
    """Compare tasks in flows that run in this process."""
    from prefect import flow, get_run_logger, task
    from prefect.logging.handlers import APILogHandler

    from prefect_dstack import run_task

    @task
    def empty() -> None:
        """Do nothing."""

    @task
    def speak() -> None:
        """Log the same number of lines, each in a record of its own."""
        logger = get_run_logger()
        for number in range(lines):
            logger.info(_LINE, number, 0)

    def sent(work: Callable[[], Any]) -> float:
        def work_and_send() -> None:
            work()
            APILogHandler().flush()

        return timed(work_and_send)

    configuration = {"type": "task", "commands": ["true"]}
    speaking = {"type": "task", "commands": [_SPEAK.format(lines)]}
    spent: dict[str, list[float]] = {"empty": [], "run": [], "speak": [], "relay": []}

    @flow
    def measured() -> None:
        for number in range(rounds + 1):
            took = {
                "empty": timed(empty),
                "run": timed(lambda: run_task(configuration, poll_interval=1.0, artifacts=False)),
                "speak": sent(speak),
                "relay": sent(lambda: run_task(speaking, poll_interval=1.0, artifacts=False)),
            }
            # The name of a run is made from the flow run and a counter, so each run has a new name.
            for name, seconds in took.items():
                if number:
                    spent[name].append(seconds)

    measured()
    empty_seconds, run_seconds, speak_seconds, relay_seconds = (median(spent[name]) for name in spent)
    section.rows.append(
        Row(
            "a 0 s run on the embedded server, Prefect",
            f"task {run_seconds:.2f} s",
            f"empty task: {empty_seconds:.2f} s",
            f"+{run_seconds - empty_seconds:.2f} s",
        )
    )
    ours, host = lines / (relay_seconds - run_seconds), lines / (speak_seconds - empty_seconds)
    size = len(_LINE % (0, 0)) / 1e6
    section.rows.append(
        Row(
            "log relay into a Prefect run logger",
            f"{ours:,.0f} lines/s, {ours * size:.2f} MB/s",
            f"the host's own limit, a task that logs line by line: {host:,.0f} lines/s, {host * size:.2f} MB/s",
            f"{ours / host:.1f}",
        )
    )
    section.notes.append(
        f"Prefect log relay: {lines:,} lines, timed until the records are sent to Prefect's API, minus the time of a "
        "run or task without a log. The relay joins up to 200 lines per record."
    )


def cancel(section: Section, server: LocalServer, folder: Path, rounds: int) -> None:
    """Cancel flow runs; compare the time of the stop request with the time at which Prefect ends a plain flow."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    def stops() -> list[float]:
        return [request.time for request in server.requests if request.path.endswith("/runs/stop")]

    def cancelled(name: str, told: Callable[[Any, int], float | None]) -> float:
        with get_client(sync_client=True) as client:

            def deployment() -> Any:
                with suppress(Exception):
                    return client.read_deployment_by_name(f"{name}/{name}")
                return None

            before = len(stops())
            applies = _applies(server)
            flow_run = client.create_flow_run_from_deployment(until(deployment).id)
            until(lambda: client.read_flow_run(flow_run.id).state_name == "Running")
            if name == "running":
                until(lambda: _applies(server) > applies)
            time.sleep(3.0)
            asked = time.monotonic()
            client.set_flow_run_state(flow_run.id, Cancelling())
            return until(lambda: told(flow_run.id, before)) - asked

    def signalled(flow_run_id: Any, before: int) -> float | None:
        file = folder / str(flow_run_id)
        return float(file.read_text()) if file.exists() and file.read_text() else None

    def stopped(flow_run_id: Any, before: int) -> float | None:
        return next(iter(stops()[before:]), None)

    with process("benchmarks.served", BENCH_FOLDER=str(folder)):
        host = median(cancelled("signalled", signalled) for _ in range(rounds))
        ours = median(cancelled("running", stopped) for _ in range(rounds))
    section.rows.append(
        Row(
            "from cancelling the flow run to the stop request on the server, Prefect",
            f"{ours:.2f} s",
            f"Prefect notifies a plain flow: {host:.2f} s",
            f"{ours - host:+.2f} s",
            "under 1 s more",
            ours - host < CANCEL_LIMIT,
        )
    )


def _applies(server: LocalServer) -> int:
    return sum(request.path.endswith("/runs/apply") for request in server.requests)


def measure(quick: bool) -> Section:
    """Measure everything on one Prefect server."""
    section = Section("In Prefect")
    rounds = 2 if quick else 5
    with prefect_with_dstack() as (server, folder):
        # The log of the relay keeps the server busy for minutes, so it comes last.
        cancel(section, server, folder, rounds)
        overhead_and_relay(section, rounds, 3_000 if quick else 20_000)
    return section


if __name__ == "__main__":
    cli(measure)
