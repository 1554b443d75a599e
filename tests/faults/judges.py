"""What must be true of a life; a judge returns what is wrong, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.case import Adapter, Ended

LINES = [f"line-{number:03}" for number in range(1, 501)]
# A budget of seconds, one last reply that is waited for, and a stop that is tried three times though each reply
# comes byte by byte; far from the minutes of other budgets.
PATIENCE = 150.0
_STOPPED = ("terminating", "terminated")


@dataclass(frozen=True)
class Life:
    """Hold what is known of a life that is over: both ends of it, and what was asked in between."""

    ended: Ended
    runs: Sequence[dict[str, Any]]
    paths: Sequence[str]
    seconds: float


def right_end(life: Life) -> str:
    """Judge a life in which one request went wrong."""
    ended, runs = life.ended, life.runs
    if ended.error is not None:
        return f"{type(ended.error).__name__}: {ended.error}"
    if len(runs) != 1:
        return f"{len(runs)} runs on the server"
    if list(ended.lines) != LINES:
        return f"{len(ended.lines)} lines, {len(set(ended.lines))} different"
    if ended.status != "done":
        return f"ended as {ended.status}: {runs[0].get('message') or runs[0].get('termination_reason')}"
    return ""


def clear_error(life: Life) -> str:
    """Judge a life that somebody or something has ended for good."""
    ended = life.ended
    if not _is_clear(ended.error):
        return f"ended as {ended.status} with {type(ended.error).__name__}: {ended.error}"
    return cut_short(life)


def cut_short(life: Life) -> str:
    """Judge what there is of a life that did not come to its own end."""
    if life.seconds > PATIENCE:
        return f"told after {life.seconds:.0f} s"
    if len(life.runs) > 1:
        return f"{len(life.runs)} runs on the server"
    if list(life.ended.lines) != LINES[: len(life.ended.lines)]:
        return "lines are missing, doubled or out of order"
    return ""


def policy(adapter: Adapter, life: Life) -> str:
    """Judge what became of a run that its adapter has lost sight of."""
    asked = "runs/stop" in life.paths
    if adapter.lost_sight == "leaves":
        return "the run was asked to stop" if asked else ""
    if not life.runs or life.runs[0]["status"] in _STOPPED or asked:
        return ""
    # A server that does not answer cannot stop it; then a person is shown the run's page, or the list of runs.
    ways_out = (f"/runs/{life.runs[0]['id']}", "/runs")
    if any(text.rstrip(".").endswith(ways_out) for text in life.ended.told):
        return ""
    return f"the run is {life.runs[0]['status']} and nobody was told"


def _is_clear(error: BaseException | None) -> bool:
    """Tell whether an error is one the library or an adapter of it raises on purpose."""
    own = type(error).__module__.startswith(("dstack_core", "airflow_provider_dstack", "prefect_dstack"))
    # What no retry can mend is told to Airflow by this error of its own.
    return own or type(error).__name__ == "AirflowFailException"
