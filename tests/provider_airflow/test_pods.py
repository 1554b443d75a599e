"""What a kubelet does to the processes of a task: SIGTERM and a grace period, or SIGKILL at once.

Each task runs in processes of its own, with the command that KubernetesExecutor gives its pods. The end of a
pod's processes is reported to the scheduler as the executor's watcher does it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import json_in, over, wait_for
from tests.provider_airflow.test_kill_matrix import Case

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.long,
    pytest.mark.fleet,
    pytest.mark.timeout(600),
]

_STEPS = [f"step-{number}" for number in range(1, 7)]
# Kubernetes' default for a pod; the template of the documentation has more.
_GRACE_SECONDS = 30.0


class Pod(Case):
    """A DAG run whose task runs in a pod, and follows ``run``."""

    run: Run

    def start_pod(self, dag_id: str) -> None:
        self.start(dag_id, self.gated)
        self.run = self.running()
        self.wait_for_step()

    def first_process(self, attempt: int = 1) -> psutil.Process:
        """Return the first process of a try's container."""
        return psutil.Process(int((self.components.home / f"{self.run_id}.{attempt}").read_text()))

    def kill(self) -> None:
        """Kill all processes of the container at once, as the end of its first process does in a pod."""
        first = self.first_process()
        for process in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self, terminate: Callable[[psutil.Process], None]) -> float:
        """Send SIGTERM, and SIGKILL after the grace period; return after how long the container had ended (seconds)."""
        first, since = self.first_process(), time.monotonic()
        processes = [first, *first.children(recursive=True)]
        terminate(first)
        _, alive = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
        seconds = time.monotonic() - since
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return seconds


@pytest.fixture
def pod(pods: Components, shared_server: LocalServer, tmp_path: Path) -> Iterator[Callable[[str], Pod]]:
    """Return what starts a DAG run whose task follows its run in a pod."""
    shared_server.faults.clear()

    def start(dag_id: str) -> Pod:
        case = Pod(pods, shared_server, tmp_path / "gate")
        case.start_pod(dag_id)
        return case

    yield start
    shared_server.faults.clear()
    shared_server.faults.slow(0)


def terminate_first(process: psutil.Process) -> None:
    """Send SIGTERM to the first process, as a kubelet does."""
    process.terminate()


def terminate_group(process: psutil.Process) -> None:
    """Send SIGTERM to the group of the first process, as dumb-init does, the init process of Airflow's image."""
    os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("terminate", [terminate_first, terminate_group])
def test_a_pod_that_is_ended_on_the_last_try_stops_its_run_within_its_grace_period(
    pod: Callable[[str], Pod],
    terminate: Callable[[psutil.Process], None],
    record_property: Callable[[str, object], None],
) -> None:
    case = pod("last_try")
    seconds = case.end(terminate)
    record_property("seconds until the pod had ended", round(seconds, 1))
    assert seconds < _GRACE_SECONDS
    assert over(case.run).raw_status == "terminated"
    case.wait("failed")
    assert len(case.runs()) == 1


def test_a_pod_that_is_ended_stops_its_run_on_a_slow_server(
    pod: Callable[[str], Pod], record_property: Callable[[str, object], None]
) -> None:
    case = pod("last_try")
    case.server.faults.slow(2.5)
    seconds = case.end(terminate_first)
    case.server.faults.slow(0)
    record_property("seconds until the pod had ended", round(seconds, 1))
    assert seconds < _GRACE_SECONDS
    assert over(case.run).raw_status == "terminated"
    case.wait("failed")


def kill(case: Pod) -> None:
    """Kill the pod at once, as a machine that goes down or runs out of memory."""
    case.kill()


def end(case: Pod) -> None:
    """End the pod, as an eviction does."""
    assert case.end(terminate_first) < _GRACE_SECONDS


@pytest.mark.parametrize("lose", [end, kill])
def test_a_pod_that_is_lost_leaves_its_run_to_the_next_try(
    pod: Callable[[str], Pod], lose: Callable[[Pod], None]
) -> None:
    case = pod("retried")
    lose(case)
    case.wait_for_step(attempt=2)
    case.gate.touch()
    case.assert_one_run_went_on(case.run)
    assert case.steps(attempt=2) == _STEPS


def test_the_reaper_stops_what_a_killed_pod_leaves_on_the_last_try(pod: Callable[[str], Pod]) -> None:
    case = pod("last_try")
    case.kill()
    case.wait("failed")
    assert case.run.refresh().raw_status == "running"
    assert case.asked("/runs/stop") == []
    shown = case.components.command("dstack", "reap", "--dry-run", "--min-age", "0", "--output", "json")
    actions = {found["run_name"]: found["action"] for found in json_in(shown.stdout)}
    assert actions[case.run.name] == "would stop"
    wait_for(
        "reaper",
        lambda: case.components.command("dstack", "reap", "--min-age", "0").returncode == 0,
        120,
    )
    assert over(case.run).raw_status == "terminated"
