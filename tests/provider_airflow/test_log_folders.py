"""Where Airflow finds the lines of a deferred task once it has ended: a triggerer with a log folder of its own.

Worker and API server share a folder here, as on one machine; the triggerer stands for a pod of its own.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import wait_for

# A triggerer is killed, and another one started: minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(900)]

_LINES = [f"deferred-{number}" for number in range(30)]


@pytest.fixture
def restart(components: Components, shared_server: LocalServer) -> Iterator[Callable[..., None]]:
    """Return a function that kills the triggerer and starts one with these settings, undone afterwards."""
    shared_server.faults.clear()

    def restart(**settings: str) -> None:
        components.signal_one("triggerer", signal.SIGKILL)
        components.end_one("triggerer")
        components.start_one("triggerer", **settings)

    yield restart
    components.end_one("triggerer")
    components.start_one("triggerer")
    components.wait_until_healthy()


def own_folder(folder: Path) -> dict[str, str]:
    return {"AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(folder)}


class Writer:
    """A deferred task whose run writes 30 lines once it is deferred, and ends at the gate."""

    def __init__(self, components: Components, dag_id: str, folder: Path) -> None:
        self.components, self.dag_id = components, dag_id
        self._start, self._gate = folder / "start", folder / "gate"
        wait = "until [ -e {} ]; do sleep 0.1; done"
        command = (
            f"echo at-first; {wait.format(self._start)}; "
            f"for i in $(seq 0 29); do echo deferred-$i; done; {wait.format(self._gate)}"
        )
        self.dag_run = components.trigger(dag_id, command=command)
        components.wait_for_state(dag_id, self.dag_run, "deferred", seconds=180)

    def write(self) -> None:
        """Return once the trigger has saved a position behind all lines."""
        self._start.touch()

        def is_saved() -> bool:
            kept = self.components.xcom(self.dag_id, self.dag_run, "dstack_progress")
            return bool(kept) and kept["tail"][-1:] == _LINES[-1:]

        wait_for("position behind the last line", is_saved, 180)

    def lines(self) -> list[str]:
        found = self.components.log_lines(self.dag_id, self.dag_run)
        return [text for text in found if text.startswith(("at-first", "deferred-"))]

    def finish(self) -> list[str]:
        """Let the run end; return what the log shows once the task has ended."""
        self._gate.touch()
        self.components.wait_for_state(self.dag_id, self.dag_run, "success", seconds=240)
        return self.lines()


@pytest.mark.parametrize(
    ("dag_id", "shown"), [("relayed_again", ["at-first", *_LINES]), ("retried_deferred", ["at-first"])]
)
def test_the_lines_of_a_triggerer_with_its_own_folder_are_kept_if_they_are_relayed_again(
    components: Components, restart: Callable[..., None], tmp_path: Path, dag_id: str, shown: list[str]
) -> None:
    restart(**own_folder(tmp_path / "triggerer"))
    task = Writer(components, dag_id, tmp_path)
    task.write()
    # While the task is deferred, Airflow asks the triggerer.
    assert task.lines() == ["at-first", *_LINES]
    # Without the option, this is what Airflow does; the page on guarantees has it.
    assert task.finish() == shown


def test_the_lines_of_a_killed_triggerer_are_kept_too(
    components: Components, restart: Callable[..., None], tmp_path: Path
) -> None:
    restart(**own_folder(tmp_path / "triggerer"))
    task = Writer(components, "relayed_again", tmp_path)
    task.write()
    restart(**own_folder(tmp_path / "another"))
    assert task.finish() == ["at-first", *_LINES]


def test_in_a_shared_folder_nothing_has_to_be_relayed_again(
    components: Components, tmp_path: Path, shared_server: LocalServer
) -> None:
    shared_server.faults.clear()
    task = Writer(components, "retried_deferred", tmp_path)
    task.write()
    assert task.finish() == ["at-first", *_LINES]
