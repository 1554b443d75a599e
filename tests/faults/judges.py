"""The conditions that a life must meet; a judge returns what is wrong, or an empty string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.case import Adapter, Ended

LINES = [f"line-{number:03}" for number in range(1, 501)]
# Seconds: a budget of a few seconds, the wait for one last reply, and three attempts to stop whose replies arrive byte
# by byte. Still far below the other budgets, which are minutes.
PATIENCE = 150.0
_STOPPED = ("terminating", "terminated")


@dataclass(frozen=True)
class Life:
    """A life that has ended: what the adapter saw, the runs on the server, and the requests in between."""

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
    """Judge a life that was ended from outside and cannot continue."""
    ended = life.ended
    if not _is_clear(ended.error):
        return f"ended as {ended.status} with {type(ended.error).__name__}: {ended.error}"
    return cut_short(life)


def cut_short(life: Life) -> str:
    """Judge the part of a life that was cut short."""
    if life.seconds > PATIENCE:
        return f"reported after {life.seconds:.0f} s"
    if len(life.runs) > 1:
        return f"{len(life.runs)} runs on the server"
    if list(life.ended.lines) != LINES[: len(life.ended.lines)]:
        return "lines are missing, doubled or out of order"
    return ""


def policy(adapter: Adapter, life: Life) -> str:
    """Judge what happened to a run that its adapter could no longer follow."""
    asked = "runs/stop" in life.paths
    if adapter.lost_sight == "leaves":
        return "a stop request was sent" if asked else ""
    if not life.runs or life.runs[0]["status"] in _STOPPED or asked:
        return ""
    # A server that does not answer cannot stop the run. Then the log must name the run's page, or the list of runs.
    ways_out = (f"/runs/{life.runs[0]['id']}", "/runs")
    if any(text.rstrip(".").endswith(ways_out) for text in life.ended.other_lines):
        return ""
    return f"the run is {life.runs[0]['status']} and no line of the log names its page"


def _is_clear(error: BaseException | None) -> bool:
    """Return whether the library or one of its adapters raises this error on purpose."""
    own = type(error).__module__.startswith(("dstack_core", "airflow_provider_dstack", "prefect_dstack"))
    # Airflow's own error, by which an operator reports that no retry can help.
    return own or type(error).__name__ == "AirflowFailException"
