"""A broker that delivers the message of a running task again, as Redis does after its visibility timeout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_tasks import STEPS, Working
from tests.provider_airflow.support import over, wait_for

pytestmark = LONG_FLEET_TEST

_WORKERS, _SCHEDULERS = ("worker", "worker-2"), ("scheduler", "scheduler-2")
_VISIBLE = {"AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT": "45"}
# Airflow's token that starts a task is valid for as long as a task may be queued, 600 s by default.
_QUEUED = {"AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "40"}


@pytest.fixture
def impatient(fleet: Fleet) -> Iterator[Callable[[bool], None]]:
    """Return what gives the workers a short visibility timeout, and the schedulers a shorter one for their tokens."""

    def restart(expired: bool) -> None:
        for name in _WORKERS:
            fleet.restart_with(name, **_VISIBLE)
        if expired:
            for name in _SCHEDULERS:
                fleet.restart_with(name, **_QUEUED)
        fleet.wait_until_healthy()

    yield restart
    fleet.restart(*_WORKERS, *_SCHEDULERS)


def wait_for_redelivery(fleet: Fleet, text: str) -> None:
    """Return once a worker has written what it does with a message that is delivered again."""
    wait_for(text, lambda: any(text in fleet.output(name) for name in _WORKERS), 240, 1.0)


def test_a_message_that_is_delivered_again_starts_nothing(
    impatient: Callable[[bool], None], working: Callable[[str], Working]
) -> None:
    impatient(False)
    case = working("last_try")
    wait_for_redelivery(case.fleet, "Task already running elsewhere")
    case.assert_alive_once()
    case.gate.touch()
    case.assert_one_run_went_on(case.run)
    assert case.steps() == STEPS


def test_a_message_that_is_delivered_after_its_token_expired_leaves_the_run_to_the_next_try(
    impatient: Callable[[bool], None], working: Callable[[str], Working]
) -> None:
    impatient(True)
    case = working("many_tries")
    case.wait_for_next_try(300)
    case.assert_alive_once()
    case.gate.touch()
    case.wait_long("success")
    assert [one.id for one in case.runs()] == [case.run.id]
    assert case.asked("/runs/stop") == []
    assert case.steps(case.try_number()) == STEPS


def test_a_message_that_is_delivered_after_its_token_expired_ends_the_last_try(
    impatient: Callable[[bool], None], working: Callable[[str], Working]
) -> None:
    impatient(True)
    case = working("last_try")
    case.components.wait_for_state(case.dag_id, case.run_id, "failed", seconds=300)
    # For Airflow, the task has failed; its run is stopped as that of every task that has.
    assert over(case.run).raw_status == "terminated"
    assert [one.id for one in case.runs()] == [case.run.id]
