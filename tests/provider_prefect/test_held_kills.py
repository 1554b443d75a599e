"""A run that is held for a shell while Prefect's processes die, or its flow run is cancelled.

A process is paused before the commands fail and killed while the container is held: it never saw the failure.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from dstack_core import Run, RunFinished
from dstack_core.local import LocalServer

from .machines import deploy, new_pool, worker
from .machines import start as start_machine
from .support import all_runs, outcome_of, state_of, stops, until
from .test_processes import START_SECONDS, cancel, python, runs_of, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("prefect_server"),
]

# Seconds, also of the flow ``held``: enough for another process on a busy machine.
_HOLD = 45
# Seconds after the hold in which the container must be gone, on a busy machine.
_END = 60.0
# What an execution needs to submit its run; one that began later shows nothing about a wait.
_MARGIN = timedelta(seconds=20)


@pytest.fixture(scope="module")
def served(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalServer, Path]]:
    """Serve the flows; return the dstack server they use, and their folder."""
    folder = tmp_path_factory.mktemp("held")
    log = folder / "log"
    with (
        LocalServer(step_seconds=0.02) as server,
        python(server, "serve", TEST_PIDS=str(folder), TEST_LOG=str(log)) as process,
    ):
        until(lambda: process.poll() is not None or _deployed(), seconds=START_SECONDS)
        assert process.poll() is None, log.read_text()[-3000:]
        yield server, folder


def _deployed() -> bool:
    with get_client(sync_client=True) as client:
        try:
            return bool(client.read_deployment_by_name("working-while-held/working_while_held"))
        except ObjectNotFound:
            return False


def wait_until_held(run: Run) -> datetime:
    until(lambda: run.refresh().is_held(), seconds=60, what="a held run")
    return datetime.now(UTC)


def ended_by_itself(run: Run, held_at: datetime, pids: list[int]) -> datetime:
    """Return when the run ended, once its hold has ended by itself; nothing of it runs then."""
    until(lambda: run.refresh().outcome(), seconds=_HOLD + _END, what="the end of the hold")
    duration = outcome_of(run).duration
    assert duration is not None
    ended_at = run.submitted_at + timedelta(seconds=duration)
    assert _HOLD - 5 < (ended_at - held_at).total_seconds() < _HOLD + _END
    until(lambda: not any(map(psutil.pid_exists, pids)), what="the end of the shells")
    end = [event for event in run.follow(through_hold=True) if isinstance(event, RunFinished)][-1]
    assert (end.outcome.exit_status, end.outcome.debug_seconds) == (3, _HOLD)
    return ended_at


def test_a_flow_that_is_killed_during_a_hold_leaves_nothing(served: tuple[LocalServer, Path]) -> None:
    server, folder = served
    flow_run_id = start("held")
    until((folder / "shells").exists, seconds=START_SECONDS, what="a running run")
    (run,) = runs_of(server, flow_run_id)
    pid = int((folder / str(flow_run_id)).read_text())
    os.kill(pid, signal.SIGSTOP)
    (folder / "fail").touch()
    held_at = wait_until_held(run)
    os.kill(pid, signal.SIGKILL)
    # The hook for a crash leaves the hold.
    until(lambda: state_of(flow_run_id).is_crashed(), seconds=60)
    _execute_again(flow_run_id)
    until(lambda: state_of(flow_run_id).is_completed(), seconds=START_SECONDS)
    (second,) = [one for one in runs_of(server, flow_run_id) if one.id != run.id]
    assert outcome_of(second).succeeded
    pids = [int(one) for one in (folder / "shells").read_text().split()]
    ended_at = ended_by_itself(run, held_at, pids)
    # The flow writes this file when it begins.
    began = datetime.fromtimestamp((folder / str(flow_run_id)).stat().st_mtime, UTC)
    if began < ended_at - _MARGIN:
        assert second.submitted_at < ended_at, "the other execution waited for the hold"
    assert stops(server) == 0


def _execute_again(flow_run_id: UUID) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Scheduled(name="AwaitingRetry"), force=True)


def test_a_flow_run_that_is_cancelled_during_a_hold_ends_it(served: tuple[LocalServer, Path]) -> None:
    server, folder = served
    flow_run_id = start("working_while_held")
    # The flow writes this file once the task has failed; it does not watch the run any longer.
    until((folder / str(flow_run_id)).exists, seconds=START_SECONDS, what="a flow that continues")
    (run,) = runs_of(server, flow_run_id)
    wait_until_held(run)
    cancel(flow_run_id)
    until(lambda: state_of(flow_run_id).is_cancelled(), seconds=START_SECONDS)
    assert run.refresh().outcome(), "the hook waits for the end"


def test_a_cancelled_plain_script_that_a_signal_ends_leaves_no_hold(
    dstack: LocalServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with python(dstack, "working_while_held", TEST_PIDS=str(tmp_path), TEST_LOG=str(log)) as process:
        until(
            lambda: process.poll() is not None or any(path != log for path in tmp_path.iterdir()),
            seconds=START_SECONDS,
        )
        assert process.poll() is None, log.read_text()[-3000:]
        (run,) = all_runs(dstack)
        wait_until_held(run)
        (pid_file,) = [path for path in tmp_path.iterdir() if path != log]
        cancel(UUID(pid_file.name))
        process.terminate()
        process.wait(60)
    assert state_of(UUID(pid_file.name)).is_crashed()
    assert run.refresh().outcome(), "the hook waits for the end"


def test_a_worker_that_is_killed_during_a_hold_leaves_nothing(dstack: LocalServer, tmp_path: Path) -> None:
    pool, log = new_pool(), tmp_path / "log"
    command = f"echo $$ > {tmp_path}/shell; until [ -e {tmp_path}/fail ]; do sleep 0.1; done; exit 3"
    flow_run = start_machine(deploy(pool, command=command, debug_on_failure=_HOLD))
    with worker(dstack, pool, log, "first") as first:
        until(lambda: (tmp_path / "shell").exists(), seconds=START_SECONDS)
        (run,) = all_runs(dstack)
        os.kill(first.pid, signal.SIGSTOP)
        (tmp_path / "fail").touch()
        held_at = wait_until_held(run)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with worker(dstack, pool, log, "second"):
        # The other worker reports the failure, whether or not the hold has ended by then.
        until(lambda: state_of(flow_run.id).is_crashed(), seconds=START_SECONDS)
        ended_by_itself(run, held_at, [int((tmp_path / "shell").read_text())])
    assert len(all_runs(dstack)) == 1
    assert stops(dstack) == 0
