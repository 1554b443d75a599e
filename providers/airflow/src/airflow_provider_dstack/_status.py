"""Tell whether a run reached what a sensor waits for; the same for the worker and the triggerer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack.errors import AirflowFailException, DstackRunError

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Run


def sight_of(run: Run | AsyncRun) -> dict[str, Any]:
    """Return, JSON-plain, what a poll showed of a run; ``outcome`` is None while it runs."""
    from dstack_core.integration import outcome_dict

    outcome = run.outcome()
    return {
        "run_name": run.name,
        "status": str(run.last_status),
        "url": run.url,
        "outcome": None if outcome is None else outcome_dict(outcome),
    }


def is_reached(sight: Mapping[str, Any], statuses: Collection[str]) -> bool:
    """Tell whether the run shows one of ``statuses``; raise when it is over and never will.

    Raises ``DstackRunFailed``, ``DstackNoCapacity``, ``DstackRunStopped``, or ``DstackRunError``.
    """
    from airflow_provider_dstack._outcome import result_of
    from dstack_core import Outcome

    if sight["status"] in statuses:
        return True
    if sight["outcome"] is None:
        return False
    result_of(Outcome.from_dict(sight["outcome"]), (), retry_option=None)
    raise DstackRunError(
        f"Run {sight['run_name']} ended as {sight['status']} and was not seen as {' or '.join(statuses)}; "
        f"add {sight['status']!r} to statuses if that is good too. See {sight['url']}",
        sight["outcome"],
    )


def not_there(run_name: str, project: str) -> AirflowFailException:
    """Return the error for a run that a sensor does not wait for."""
    return AirflowFailException(
        f"run_name: there is no run {run_name!r} in project {project}; correct the name, or pass "
        "wait_for_run=True to wait until it appears"
    )
