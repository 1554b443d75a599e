"""A single task on a fleet, and the worker that runs it."""

from __future__ import annotations

from dstack_core import Run
from tests.provider_airflow.fleet import HEARTBEAT_SECONDS, Fleet
from tests.provider_airflow.support import wait_for
from tests.provider_airflow.test_kill_matrix import Case

STEPS = [f"step-{number}" for number in range(1, 7)]
# The scheduler looks for lost tasks every ten seconds; the rest is for a busy machine.
NOTICED_SECONDS = HEARTBEAT_SECONDS + 80.0


class Working(Case):
    """A DAG run whose task follows ``run`` on the worker ``worker``."""

    run: Run
    worker: str

    def start_working(self, dag_id: str) -> None:
        self.start(dag_id, self.gated)
        self.run = self.running()
        self.wait_for_step()
        worker = self.fleet.component_on(self.components.task(self.dag_id, self.run_id)["hostname"])
        assert worker is not None
        self.worker = worker

    @property
    def fleet(self) -> Fleet:
        assert isinstance(self.components, Fleet)
        return self.components

    @property
    def state(self) -> str:
        return str(self.components.task(self.dag_id, self.run_id)["state"])

    def try_number(self) -> int:
        return int(self.components.task(self.dag_id, self.run_id)["try_number"])

    def wait_long(self, *states: str) -> None:
        """Return once the task is in one of the states, as late as Airflow notices a lost worker."""
        self.components.wait_for_state(self.dag_id, self.run_id, *states, seconds=NOTICED_SECONDS)

    def wait_for_next_try(self, seconds: float = NOTICED_SECONDS) -> None:
        """Return once a later try follows the run; tries that Airflow could not start do not count."""

        def follows() -> bool:
            task = self.components.task(self.dag_id, self.run_id)
            number = int(task["try_number"])
            return number > 1 and task["state"] == "running" and "step-3" in self.log(number)

        wait_for("next try that follows the run", follows, seconds, 1.0)

    def assert_alive_once(self) -> None:
        """Assert that the run is the only one, and was not stopped."""
        assert [one.id for one in self.runs()] == [self.run.id]
        assert self.run.refresh().raw_status == "running"
        assert self.asked("/runs/stop") == []
