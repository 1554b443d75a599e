"""Cancelled, interrupted and killed flow runs, in processes of their own: what becomes of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelling, Crashed, Scheduled

from dstack_core import Run
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials
from prefect_dstack.reaper import reap
from tests.callback_journal import VARIABLE, calls, count, lines_of

from .hosts import module
from .support import all_runs, is_running, log_records, outcome_of, set_state, state_of, stops, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_server")]

ROOT = Path(__file__).parents[2]
MODULE = "tests.provider_prefect.served_flows"
# A limit for a busy machine; each wait ends as soon as its condition holds.
START_SECONDS = 300.0

# How many runs each flow has.
CANCELLED = {
    "direct": 1,
    "submitted": 1,
    "mapped": 3,
    "adirect": 1,
    "agathered": 2,
    "asubmitted": 1,
    "sync_in_async": 1,
    "parent": 1,
}


@contextmanager
def python(server: LocalServer, *arguments: str, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the flows' module in a process that ends with the test."""
    environment = {
        **os.environ,
        "DSTACK_SERVER_URL": server.url,
        "DSTACK_PROJECT": server.project,
        "DSTACK_TOKEN": server.token,
        **extra,
    }
    with module(MODULE, *arguments, log=Path(extra["TEST_LOG"]), environment=environment) as process:
        yield process


@pytest.fixture(scope="module")
def served(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalServer, Path]]:
    """Serve the flows; return the dstack server they use and where they leave their process ids."""
    directory = tmp_path_factory.mktemp("served")
    log = directory / "log"
    with (
        LocalServer(step_seconds=0.02) as server,
        python(
            server,
            "serve",
            TEST_PIDS=str(directory),
            TEST_LOG=str(log),
            **{VARIABLE: str(directory / "callbacks")},
        ) as process,
    ):
        until(lambda: process.poll() is not None or deployed(), seconds=START_SECONDS)
        assert process.poll() is None, log.read_text()[-3000:]
        yield server, directory


@dataclass
class Case:
    """A flow run that was cancelled, and how long its runs took to end (seconds)."""

    flow_run_id: UUID
    stopped_after: float | None = None
    error: str | None = None


@pytest.fixture(scope="module")
def cancelled(served: tuple[LocalServer, Path]) -> dict[str, Case]:
    """Start all flows that are to be cancelled at once, which takes longest, then cancel each."""
    server, _ = served
    cases = {name: Case(start(name)) for name in CANCELLED}
    for name, case in cases.items():
        try:
            until(running(server, case.flow_run_id, CANCELLED[name]), seconds=START_SECONDS)
            case.stopped_after = stopped_after(server, case.flow_run_id, cancel(case.flow_run_id))
        except AssertionError as error:
            case.error = str(error)
    return cases


def deployed() -> bool:
    with get_client(sync_client=True) as client:
        return {*CANCELLED, "hooked", "kept"} <= {made.name for made in client.read_deployments()}


def start(name: str) -> UUID:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{name.replace('_', '-')}/{name}")
        return client.create_flow_run_from_deployment(deployment.id).id


def cancel(flow_run_id: UUID) -> float:
    """Cancel a flow run as the UI does; return when."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
    return time.monotonic()


def runs_of(server: LocalServer, flow_run_id: UUID) -> list[Run]:
    """Return the runs of a flow run and its subflows."""
    ids = [str(flow_run_id), *(str(item) for item in children(flow_run_id))]
    return [run for run in all_runs(server) if any(f"/{item}/" in (run.marker or "") for item in ids)]


def children(flow_run_id: UUID) -> list[UUID]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return [run.id for run in client.read_flow_runs(flow_run_filter=chosen)]


def running(server: LocalServer, flow_run_id: UUID, count: int) -> Callable[[], bool]:
    def ready() -> bool:
        runs = runs_of(server, flow_run_id)
        return len(runs) == count and all(run.raw_status == "running" for run in runs)

    return ready


def stopped_after(server: LocalServer, flow_run_id: UUID, since: float) -> float:
    until(lambda: all(run.outcome() for run in runs_of(server, flow_run_id)), seconds=START_SECONDS)
    return time.monotonic() - since


@pytest.mark.parametrize("name", CANCELLED)
def test_a_cancelled_flow_run_stops_its_runs(
    name: str, served: tuple[LocalServer, Path], cancelled: dict[str, Case]
) -> None:
    server, _ = served
    case, count = cancelled[name], CANCELLED[name]
    assert case.stopped_after is not None, case.error
    print(f"{name}: stopped {case.stopped_after:.1f} s after the cancellation")  # noqa: T201
    runs = runs_of(server, case.flow_run_id)
    assert [outcome_of(run).reason for run in runs] == ["stopped_by_user"] * count
    until(
        lambda: state_of(case.flow_run_id).is_cancelled(),
        seconds=START_SECONDS,
        what="the flow run is Cancelled",
    )
    assert len(runs_of(server, case.flow_run_id)) == count


def test_each_run_got_one_stop_request(served: tuple[LocalServer, Path], cancelled: dict[str, Case]) -> None:
    """The hooks come after the tasks; a run that is stopping already is left alone."""
    server, _ = served
    log_records(cancelled["parent"].flow_run_id, last="finished running successfully", seconds=START_SECONDS)
    assert stops(server) == sum(CANCELLED.values())


def test_the_cancellation_hook_runs_too_and_finds_nothing_left(cancelled: dict[str, Case]) -> None:
    flow_run_id = cancelled["parent"].flow_run_id
    messages = log_records(flow_run_id, last="finished running successfully", seconds=START_SECONDS)
    assert any("Hook 'stop_runs_on_cancellation' finished" in message for message in messages)
    assert not any("An error was encountered while running hook" in message for message in messages)


def kill(served: tuple[LocalServer, Path], name: str) -> tuple[UUID, float]:
    server, directory = served
    flow_run_id = start(name)
    until(running(server, flow_run_id, 1), seconds=START_SECONDS, what=f"a running run of {name}")
    os.kill(int((directory / str(flow_run_id)).read_text()), signal.SIGKILL)
    return flow_run_id, time.monotonic()


def test_the_hook_stops_the_run_of_a_killed_flow(served: tuple[LocalServer, Path]) -> None:
    flow_run_id, killed = kill(served, "hooked")
    seconds = stopped_after(served[0], flow_run_id, killed)
    print(f"hooked: stopped {seconds:.1f} s after SIGKILL")  # noqa: T201
    assert len(runs_of(served[0], flow_run_id)) == 1
    until(lambda: state_of(flow_run_id).is_crashed(), seconds=START_SECONDS)


def test_a_run_that_outlives_its_flow_is_followed_again(served: tuple[LocalServer, Path]) -> None:
    server, directory = served
    flow_run_id, _ = kill(served, "kept")
    until(lambda: state_of(flow_run_id).is_crashed(), seconds=START_SECONDS)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Scheduled(name="AwaitingRetry"), force=True)
    log_records(flow_run_id, last="An earlier execution", seconds=START_SECONDS)
    (directory / "go").touch()
    until(lambda: state_of(flow_run_id).is_completed(), seconds=START_SECONDS)
    (run,) = runs_of(server, flow_run_id)
    assert outcome_of(run).succeeded
    log_records(flow_run_id, last="the-end", seconds=START_SECONDS)
    check_calls(directory, run)


def check_calls(directory: Path, run: Run) -> None:
    """Assert that the second execution called for the run from its beginning, and for its end alone."""
    found = calls(directory / "callbacks", run.name)
    first, second = [one for one in found if one.kind == "submitted"]
    assert (first.is_taken_over, second.is_taken_over) == (False, True)
    assert "the-end" in lines_of([one for one in found if one.process == second.process])
    assert found[-1].kind == "ended"
    assert count(found, "ended") == 1


def test_a_run_that_ended_after_its_flow_died_is_not_paid_twice(served: tuple[LocalServer, Path]) -> None:
    server, directory = served
    (directory / "go").unlink(missing_ok=True)
    flow_run_id, _ = kill(served, "kept")
    until(lambda: state_of(flow_run_id).is_crashed(), seconds=START_SECONDS)
    (directory / "go").touch()
    until(lambda: all(run.outcome() for run in runs_of(server, flow_run_id)), seconds=START_SECONDS)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Scheduled(name="AwaitingRetry"), force=True)
    until(lambda: state_of(flow_run_id).is_completed(), seconds=START_SECONDS)
    (run,) = runs_of(server, flow_run_id)
    assert outcome_of(run).succeeded
    log_records(flow_run_id, last="the-end", seconds=START_SECONDS)
    check_calls(directory, run)


@pytest.mark.parametrize("name", ["direct", "submitted", "adirect"])
def test_control_c_in_a_plain_script_stops_the_run(name: str, dstack: LocalServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with python(dstack, name, TEST_LOG=str(log)) as process:
        until(
            lambda: process.poll() is not None or is_running(dstack),
            seconds=START_SECONDS,
        )
        assert process.poll() is None, log.read_text()[-3000:]
        os.kill(process.pid, signal.SIGINT)
        pressed = time.monotonic()
        until(lambda: all(run.outcome() for run in all_runs(dstack)), seconds=START_SECONDS)
        seconds = time.monotonic() - pressed
        print(f"{name}: stopped {seconds:.1f} s after Ctrl-C")  # noqa: T201
        assert process.wait(START_SECONDS) != 0
    (run,) = all_runs(dstack)
    assert outcome_of(run).reason == "stopped_by_user"
    assert stops(dstack) == 1


def test_a_killed_plain_script_is_stopped_once_its_flow_run_is_crashed(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    """No process calls the hooks of a plain script, and its flow run stays Running."""
    with python(dstack, "hooked", TEST_PIDS=str(tmp_path), TEST_LOG=str(tmp_path / "log")) as process:
        until(lambda: is_running(dstack), seconds=START_SECONDS)
        (pid_file,) = [path for path in tmp_path.iterdir() if path.name != "log"]
        process.kill()
        process.wait(START_SECONDS)
    flow_run_id = UUID(pid_file.name)
    (run,) = all_runs(dstack)
    (finding,) = [found for found in reap(credentials, min_age=0) if found["run_name"] == run.name]
    assert (finding["stopped"], finding["reason"]) == (False, "its flow run has not ended")
    assert state_of(flow_run_id).is_running()
    set_state(flow_run_id, Crashed())
    (finding,) = [found for found in reap(credentials, min_age=0) if found["run_name"] == run.name]
    assert (finding["stopped"], finding["reason"]) == (True, "its flow run has ended")
    assert outcome_of(run).reason == "stopped_by_user"


def test_a_plain_script_notices_a_cancellation_by_itself(dstack: LocalServer, tmp_path: Path) -> None:
    with python(dstack, "direct", TEST_PIDS=str(tmp_path), TEST_LOG=str(tmp_path / "log")) as process:
        until(lambda: is_running(dstack), seconds=START_SECONDS)
        (pid_file,) = [path for path in tmp_path.iterdir() if path.name != "log"]
        cancelled = cancel(UUID(pid_file.name))
        until(lambda: all(run.outcome() for run in all_runs(dstack)), seconds=START_SECONDS)
        seconds = time.monotonic() - cancelled
        print(f"plain script: stopped {seconds:.1f} s after the cancellation")  # noqa: T201
        process.wait(START_SECONDS)
    assert len(all_runs(dstack)) == stops(dstack) == 1
    # Only the server itself sets the flow run from Cancelling to Cancelled, after 300 s.
    state = state_of(UUID(pid_file.name))
    assert state.is_cancelling() or state.is_cancelled()
