"""Prefect's server at scale: two API processes on Postgres, one of them killed; a hundred flow runs of a worker."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from dstack_core.local import LocalServer
from tests.postgres import PostgresMissing

from . import hosts
from .api_servers import Balancer, TwoServers, balanced, two_servers
from .machines import START_SECONDS, cancel, deploy, new_pool, start, worker
from .support import all_runs, log_records, state_of, task_states, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoServers]:
    """Two Prefect servers on one Postgres database; this process uses both."""
    try:
        with (
            two_servers(tmp_path_factory.mktemp("servers")) as both,
            temporary_settings({PREFECT_API_URL: both.balancer.url}),
        ):
            yield both
    except PostgresMissing as missing:
        pytest.skip(str(missing))


@contextmanager
def flow_process(balancer: Balancer, dstack: LocalServer, folder: Path, count: int) -> Iterator[UUID]:
    """Start the mapped flow in a process; yield its id once all runs are running, then let them end."""
    log, file = folder / "log", folder / "go-on"
    environment = {
        **os.environ,
        "PREFECT_API_URL": balancer.url,
        "DSTACK_SERVER_URL": dstack.url,
        "DSTACK_PROJECT": dstack.project,
        "DSTACK_TOKEN": dstack.token,
    }
    name = "tests.provider_prefect.mapped_flow"
    with hosts.module(name, str(count), str(file), log=log, environment=environment) as process:
        until(lambda: running(dstack) == count or process.poll() is not None, seconds=START_SECONDS)
        found = re.search(r"^[0-9a-f-]{36}$", log.read_text(), re.MULTILINE)
        assert found, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        yield UUID(found[0])
        file.touch()
        until(lambda: process.poll() is not None, seconds=START_SECONDS, what="the flow has ended")
        assert process.returncode == 0, log.read_text()[-3000:]


def running(dstack: LocalServer) -> int:
    """Return how many runs are running."""
    return sum(run.raw_status == "running" for run in all_runs(dstack))


def is_final(flow_run_id: UUID) -> bool:
    """Return whether the flow run has ended."""
    return bool(state_of(flow_run_id).is_final())


def records(flow_run_id: UUID, word: str, count: int) -> list[str]:
    """Return the log of the flow run once each task's line with the word is there."""
    wanted = [f"{word}-{number}" for number in range(count)]
    return log_records(flow_run_id, last=wanted, seconds=START_SECONDS)


def check(flow_run_id: UUID, dstack: LocalServer, count: int) -> None:
    """Check that each task had one run, and that Prefect has its end and its log, each line once."""
    assert [run.raw_status for run in all_runs(dstack)] == ["done"] * count
    until(lambda: state_of(flow_run_id).is_completed(), what="the flow run is Completed")
    wanted = ["COMPLETED"] * count
    until(lambda: task_states(flow_run_id) == wanted, what="all task runs are Completed")
    lines = Counter("\n".join(records(flow_run_id, "after", count)).split("\n"))
    each = [f"{word}-{number}" for word in ("before", "after") for number in range(count)]
    assert {line: lines[line] for line in each} == dict.fromkeys(each, 1)


def test_connections_to_prefect_that_are_cut_leave_one_run_for_each_task(
    prefect_server: str, dstack: LocalServer, tmp_path: Path
) -> None:
    port = int(prefect_server.rpartition(":")[2].split("/")[0])
    with balanced(port) as balancer:
        with flow_process(balancer, dstack, tmp_path, 3) as flow_run_id:
            balancer.cut()
        check(flow_run_id, dstack, 3)


@pytest.mark.matrix
@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_api_server_leaves_one_run_for_each_mapped_task(
    servers: TwoServers, dstack: LocalServer, tmp_path: Path, count: int
) -> None:
    before = dict(servers.balancer.served)
    with flow_process(servers.balancer, dstack, tmp_path, count) as flow_run_id:
        records(flow_run_id, "before", count)
        servers.kill_first()
    assert all(servers.balancer.served[port] > before[port] for port in servers.ports)
    check(flow_run_id, dstack, count)
    servers.start_first()


class Watch(threading.Thread):
    """Most runs that were active at once, and most memory of a process, until the block ends."""

    def __init__(self, dstack: LocalServer, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._dstack, self._process = dstack, process
        self.active, self.memory = 0, 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Look every half second."""
        while not self._ended.wait(0.5):
            active = sum(run.outcome() is None for run in all_runs(self._dstack))
            self.active = max(self.active, active)
            self.memory = max(self.memory, self._process.memory_info().rss)

    def end(self) -> None:
        """End it."""
        self._ended.set()
        self.join()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("count", "limit", "where"),
    [
        (8, 3, "one server"),
        pytest.param(100, 20, "two servers", marks=[pytest.mark.long]),
    ],
)
def test_each_of_many_flow_runs_has_one_machine_and_half_of_them_are_cancelled(
    count: int,
    limit: int,
    where: str,
    request: pytest.FixtureRequest,
    dstack: LocalServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    two = request.getfixturevalue("servers") if where == "two servers" else None
    api = two.balancer.url if two else request.getfixturevalue("prefect_server")
    with temporary_settings({PREFECT_API_URL: api}) if two else nullcontext():
        pool, file = new_pool(), tmp_path / "go-on"
        script = Path(__file__).with_name("brief_flow_run.py")
        deployment = deploy(pool, command=f"python3 -S -E {script} {file}")
        flow_runs = [start(deployment) for _ in range(count)]
        with worker(dstack, pool, tmp_path / "log", limit=limit, api=api) as process:
            watch = Watch(dstack, psutil.Process(process.pid))
            watch.start()
            until(lambda: running(dstack) == limit, seconds=START_SECONDS, what="the limit is reached")
            # Of those that run and of those that wait, every second one.
            for flow_run in flow_runs[::2]:
                cancel(flow_run)
            # A machine that ended by itself before its stop would have set its own state.
            for flow_run in flow_runs[::2]:
                until(partial(is_final, flow_run.id), seconds=2 * START_SECONDS, pause=0.2)
            file.touch()
            for flow_run in flow_runs:
                until(partial(is_final, flow_run.id), seconds=2 * START_SECONDS, pause=0.2)
            until(lambda: all(run.outcome() for run in all_runs(dstack)), seconds=60)
            watch.end()
        states = Counter(state_of(flow_run.id).type.value for flow_run in flow_runs)
        assert states == {"CANCELLED": (count + 1) // 2, "COMPLETED": count // 2}
    machines = Counter(
        re.findall(
            r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            " ".join(run.marker or "" for run in all_runs(dstack)),
        )
    )
    assert set(machines.values()) == {1}
    assert {str(flow_run.id) for flow_run in flow_runs[1::2]} <= set(machines)
    assert watch.active <= limit
    requests = len(dstack.requests) / len(machines)
    record_property("runs", len(machines))
    record_property("requests a run", f"{requests:.0f}")
    record_property("memory of the worker", f"{watch.memory / 1e6:.0f} MB")
