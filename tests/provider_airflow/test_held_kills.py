"""A run that is held for a shell while Airflow's processes die, with its real components.

A process is paused before the commands fail and killed while the container is held: it never saw the failure.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from dstack_core import Run, RunFinished
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import over, paths, runs_of, wait_for
from tests.rig.server import RealServer

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(900)]

# Seconds, of the DAGs ``held`` and ``held_deferred``: enough for the next try on a busy machine.
_HOLD = 45
# Seconds after the hold in which the container and its processes must be gone, on a busy machine.
_END = 60.0
# What a try needs to submit its run; one that began later shows nothing about a wait.
_MARGIN = timedelta(seconds=20)


class HeldTask:
    """A DAG run whose first run fails once there is a file ``fail``; its second run succeeds."""

    def __init__(
        self, components: Components, server: LocalServer | RealServer, folder: Path, dag_id: str
    ) -> None:
        self.components = components
        self.server = server
        self.folder = folder
        self.dag_id = dag_id
        command = (
            f"echo $$ >> {folder}/shells; until [ -e {folder}/fail ]; do sleep 0.1; done; "
            f"[ -e {folder}/again ] || {{ touch {folder}/again; exit 3; }}"
        )
        self.stops_before = self.stops()
        self.dag_run = components.trigger(dag_id, command=command)

        def started() -> Run | None:
            found = runs_of(server, f"airflow:{dag_id}/{self.dag_run}/")
            return found[0] if found and (folder / "shells").exists() else None

        self.run = wait_for("running run", started, 180)
        self.held_at = datetime.now(UTC)

    def runs(self) -> list[Run]:
        return runs_of(self.server, f"airflow:{self.dag_id}/{self.dag_run}/")

    def stops(self) -> int:
        """Return how many stop requests the embedded server has had."""
        return len(paths(self.server, "/runs/stop")) if isinstance(self.server, LocalServer) else 0

    def fail(self) -> None:
        """Let the commands fail, and wait until the container is held."""
        (self.folder / "fail").touch()
        wait_for("held run", lambda: self.run.refresh().is_held(), 60)
        self.held_at = datetime.now(UTC)

    def assert_the_next_try_did_not_wait_and_nothing_is_left(self) -> None:
        self.components.wait_for_state(self.dag_id, self.dag_run, "success", seconds=180)
        newest, oldest = self.runs()
        assert oldest.id == self.run.id
        assert newest.name != oldest.name
        assert over(newest).raw_status == "done"
        # Nothing ends the hold but its own time.
        over(self.run, _HOLD + _END)
        known = self.run.outcome()
        assert known is not None
        assert known.duration is not None
        ended_at = self.run.submitted_at + timedelta(seconds=known.duration)
        assert _HOLD - 5 < (ended_at - self.held_at).total_seconds() < _HOLD + _END
        began = datetime.fromisoformat(self.components.task(self.dag_id, self.dag_run)["start_date"])
        if began < ended_at - _MARGIN:
            assert newest.submitted_at < ended_at, "the next try waited for the hold"
        end = [event for event in self.run.follow(through_hold=True) if isinstance(event, RunFinished)][-1]
        assert (end.outcome.exit_status, end.outcome.debug_seconds) == (3, _HOLD)
        shells = [int(pid) for pid in (self.folder / "shells").read_text().split()]
        wait_for("end of the shells", lambda: not any(map(psutil.pid_exists, shells)), _END)
        assert self.stops() == self.stops_before


@pytest.fixture
def start(components: Components, shared_server: LocalServer, tmp_path: Path) -> Callable[[str], HeldTask]:
    return lambda dag_id: HeldTask(components, shared_server, tmp_path, dag_id)


def kill_during_the_hold(one: HeldTask) -> None:
    process = psutil.Process(one.components.task(one.dag_id, one.dag_run)["pid"])
    process.suspend()
    one.fail()
    process.kill()


def test_a_worker_that_is_killed_during_a_hold_leaves_nothing(start: Callable[[str], HeldTask]) -> None:
    one = start("held")
    kill_during_the_hold(one)
    one.assert_the_next_try_did_not_wait_and_nothing_is_left()


@pytest.mark.real
@pytest.mark.long
def test_a_worker_that_is_killed_during_a_hold_leaves_nothing_on_a_real_server(
    real_components: Components, real_server: RealServer, tmp_path: Path
) -> None:
    one = HeldTask(real_components, real_server, tmp_path, "held")
    kill_during_the_hold(one)
    one.assert_the_next_try_did_not_wait_and_nothing_is_left()


def test_a_triggerer_that_is_killed_during_a_hold_leaves_nothing(start: Callable[[str], HeldTask]) -> None:
    one = start("held_deferred")
    components = one.components
    components.wait_for_state(one.dag_id, one.dag_run, "deferred")

    def watched() -> bool:
        return bool(components.task(one.dag_id, one.dag_run)["triggerer_job"])

    wait_for("trigger in a triggerer", watched)
    components.signal_one("triggerer", signal.SIGSTOP)
    one.fail()
    components.signal_one("triggerer", signal.SIGKILL)
    components.end_one("triggerer")
    components.start_one("triggerer")
    one.assert_the_next_try_did_not_wait_and_nothing_is_left()


def test_a_dag_run_that_is_marked_failed_during_a_hold_keeps_it(
    start: Callable[[str], HeldTask],
) -> None:
    one = start("held_before_retry")
    one.fail()
    one.components.wait_for_state(one.dag_id, one.dag_run, "up_for_retry")
    one.components.set_run_state(one.dag_id, one.dag_run, "failed")
    one.components.wait_for_run_end(one.dag_id, one.dag_run)
    assert one.run.refresh().is_held()
    assert one.stops() == one.stops_before
    # The shell's owner ends it.
    Path(_done_file(one.run)).touch()
    assert over(one.run).raw_status == "failed"


def _done_file(run: Run) -> str:
    return run.wait().debug_done
