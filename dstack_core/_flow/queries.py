"""Small flows on runs: find, list (PROTOCOL 1.7)."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import PAGE_SIZE, Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import ConfigurationError, ProtocolError, RunNotFoundError
from dstack_core.models.options import check_choice
from dstack_core.models.records import EventRecord
from dstack_core.models.statuses import RunStatus


def get_known_run(api: Api, name: str, run_id: str | None) -> Op[RunSnapshot]:
    """Return a run that is known to have existed. Raises ``RunNotFoundError`` when it was deleted."""
    run = yield from call(api.get_run(name, run_id))
    if run is None:
        raise RunNotFoundError(f"the run {name} is no longer in project {api.project}")
    return run


def list_runs(
    api: Api, *, all: bool, limit: int | None = None, is_wanted: Callable[[RunSnapshot], bool] | None = None
) -> Op[list[RunSnapshot]]:
    """Return the project's runs, newest first.

    Without ``all``: the active ones, or the latest finished one when none is active (PROTOCOL 3.1). With
    ``is_wanted`` only runs that it returns True for, and without ``all`` only active ones. No more pages are
    read than ``limit`` runs need. Replaced and deleted runs are left out. Raises ``ProjectNotFoundError``.
    """
    most = None if limit is None else check_limit(limit)
    runs = [] if all else (yield from _pages(api, only_active=True, most=most, is_wanted=is_wanted))
    if not runs and (all or is_wanted is None):
        runs = yield from _pages(api, only_active=False, most=most if all else 1, is_wanted=is_wanted)
    if not runs:
        # Servers of every version list no runs for a project that they do not have.
        yield from call(api.get_project(api.project))
    return runs


def active_runs(api: Api, is_wanted: Callable[[RunSnapshot], bool]) -> Op[list[RunSnapshot]]:
    """Return the project's active runs that ``is_wanted`` returns True for, newest first."""
    return (yield from _pages(api, only_active=True, is_wanted=is_wanted))


def _pages(
    api: Api,
    *,
    only_active: bool,
    most: int | None = None,
    is_wanted: Callable[[RunSnapshot], bool] | None = None,
) -> Op[list[RunSnapshot]]:
    runs: list[RunSnapshot] = []
    last: RunSnapshot | None = None
    while True:
        page = yield from call(api.list_runs(only_active=only_active, after=last))
        # Pages are continued from their last run. A server that ignores the position would send the same page
        # again, and this loop would never end.
        if last is not None and page and page[-1].id == last.id:
            raise ProtocolError(f"{api.server_url} gives the same page of runs again and again")
        # Servers list replaced and deleted runs among the finished ones (PROTOCOL 1.7).
        runs += [run for run in page if not run.deleted and (is_wanted is None or is_wanted(run))]
        if len(page) < PAGE_SIZE or (most is not None and len(runs) >= most):
            return runs[:most]
        last = page[-1]


# How many metric values are requested at most. A server keeps one value in ten seconds, for a few hours, so
# this is all of them; a smaller number would cut the beginning off.
MOST_VALUES = 10_000


def run_filter(
    status: str | Collection[str] | None, marker_prefix: str | None
) -> Callable[[RunSnapshot], bool] | None:
    """Return the test for runs with one of the statuses and a marker that begins so, None for all runs.

    Raises ``ConfigurationError``.
    """
    if status is None and marker_prefix is None:
        return None
    statuses = [status] if isinstance(status, str) else list(status or ())
    for each in statuses:
        check_choice("status", each, tuple(known.value for known in RunStatus))
    if marker_prefix is not None and not isinstance(marker_prefix, str):
        raise ConfigurationError(f"marker_prefix: expected the beginning of a marker, got {marker_prefix!r}.")

    def is_wanted(run: RunSnapshot) -> bool:
        fits = not statuses or run.status in statuses
        return fits and (run.marker or "").startswith(marker_prefix or "")

    return is_wanted


def list_events(api: Api, run_id: str, limit: int | None) -> Op[list[EventRecord]]:
    """Return the run's newest events, ``limit`` of them or all, oldest first."""
    most = None if limit is None else check_limit(limit)
    events: list[EventRecord] = []
    while most is None or len(events) < most:
        size = PAGE_SIZE if most is None else min(PAGE_SIZE, most - len(events))
        page = yield from call(api.list_events(run_id, limit=size, after=events[-1] if events else None))
        if events and page and page[-1].id == events[-1].id:
            raise ProtocolError(f"{api.server_url} gives the same page of events again and again")
        events += page
        if len(page) < size:
            break
    return events[::-1]


def check_limit(limit: int) -> int:
    """Return ``limit``, or raise ``ConfigurationError``."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit: expected a number above 0, or None for all, got {limit!r}.")
    return limit
