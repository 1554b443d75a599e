"""A deferred sensor in a real Airflow: whatever happens to it, it does not stop the run it watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import paths, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

# The sensor polls twice a second.
_QUIET_SECONDS = 5.0


class Watched:
    """A deferred sensor and the run it waits for, which keeps running until ``gate`` exists."""

    def __init__(self, components: Components, server: LocalServer, gate: Path) -> None:
        self.components = components
        self.server = server
        self.gate = gate
        with server.client() as client:
            self.run: Run = client.runs.submit(
                {"type": "task", "commands": [f"until [ -e {gate} ]; do sleep 0.1; done"]}
            )
        self.stops_before = self.stops()
        self.dag_run = components.trigger("sensor", run_name=self.run.name)
        components.wait_for_state("sensor", self.dag_run, "deferred")
        self.wait_for_looks()

    def stops(self) -> int:
        return len(paths(self.server, "/runs/stop"))

    def looks(self) -> list[float]:
        """Return the times of the run's polls; no other run is watched meanwhile."""
        return [one.time for one in self.server.requests if one.path.endswith("/runs/get")]

    def wait_for_looks(self) -> None:
        number = len(self.looks())
        wait_for("polls by the trigger", lambda: len(self.looks()) > number + 2)


@pytest.fixture
def watched(components: Components, shared_server: LocalServer, tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(components, shared_server, tmp_path / "gate")
    yield watched
    watched.gate.touch()


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_marked_sensor_stops_polling_and_does_not_stop_the_run(watched: Watched, state: str) -> None:
    components = watched.components
    components.set_state("sensor", watched.dag_run, state)
    wait_for("end of the trigger", lambda: time.monotonic() - watched.looks()[-1] > _QUIET_SECONDS)
    assert components.task("sensor", watched.dag_run)["state"] == state
    assert watched.stops() == watched.stops_before
    assert watched.run.refresh().outcome() is None


def test_a_sensor_outlives_its_triggerer(watched: Watched) -> None:
    components = watched.components
    components.end_one("triggerer")
    components.start_one("triggerer")
    watched.wait_for_looks()
    assert watched.run.refresh().outcome() is None
    watched.gate.touch()
    components.wait_for_state("sensor", watched.dag_run, "success")
    assert components.result("sensor", watched.dag_run)["status"] == "done"
    assert watched.stops() == watched.stops_before
