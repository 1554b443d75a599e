"""Stop a run that is ours, and no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from airflow_provider_dstack._compat import task_state

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskInstanceLike
    from dstack_core import Client, Run

OnKillAction = Literal["stop", "abort", "keep"]
ON_KILL_ACTIONS: tuple[str, ...] = get_args(OnKillAction)

# A client that stops has seconds, not minutes: these are the limits for its requests, in seconds.
KILL_LIMITS: dict[str, float] = {"timeout": 2.0, "connect_timeout": 2.0, "retry_budget": 1.0}

# How long a run is looked at for a stop that the server forgot, where there is time for that.
INSIST_SECONDS = 10.0

_TRIES = 3
_PAUSE_SECONDS = 1.0

_ENDED = frozenset({"failed", "success", "restarting", "skipped", "upstream_failed", "removed"})
# The last three are those of a task that Airflow has given up on this worker, and will try on another.
_GOING_ON = frozenset({"running", "up_for_retry", "scheduled", "queued"})


def was_ended(ti: TaskInstanceLike) -> bool:
    """Tell whether a user ended the task that still runs; when Airflow cannot be asked, it was not."""
    try:
        return task_state(ti) in _ENDED
    except Exception:
        return False


def will_go_on(ti: TaskInstanceLike) -> bool:
    """Tell whether a killed task goes on elsewhere: nobody ended it, its worker is going away.

    Raises what Airflow raises when it cannot be asked.
    """
    return task_state(ti) in _GOING_ON


def stop_run(
    client: Client, run_name: str, marker: str, *, abort: bool, insist_for: float = 0.0
) -> Run | None:
    """Ask the server to stop the run of that name if it carries ``marker``; return it if it does.

    A run of another owner is left alone: with a ``run_name`` of the user's it may have the same name.
    ``insist_for`` (seconds) as for ``Run.stop``. Raises the server errors.
    """
    run = client.runs.get(run_name)
    if run is None or run.marker != marker:
        return None
    if run.outcome() is None:
        run.stop(abort=abort, insist_for=insist_for)
    return run


def stop_patiently(client: Client, run_name: str, marker: str, *, abort: bool, log: Any) -> bool:
    """Do ``stop_run`` with three tries; log what happened and tell whether nothing is left to stop.

    Looks at the run for up to ten seconds, for a busy server may forget a stop.
    """
    for number in range(1, _TRIES + 1):
        try:
            run = stop_run(client, run_name, marker, abort=abort, insist_for=INSIST_SECONDS)
            going_on = run is not None and _goes_on(run)
        except Exception as error:
            log.error("Stopping run %s failed, try %s of %s: %s", run_name, number, _TRIES, error)
            if number < _TRIES:
                time.sleep(_PAUSE_SECONDS)
            continue
        if going_on:
            log.error("The server forgets that run %s is to be stopped", run_name)
            break
        log.info("Asked the server to stop run %s" if run else "There is no run %s to stop", run_name)
        return True
    log.error("Run %s may still be going; stop it with: dstack stop %s", run_name, run_name)
    return False


def _goes_on(run: Run) -> bool:
    from dstack_core import RunNotFoundError, RunStatus

    try:
        run.refresh()
    except RunNotFoundError:
        return False
    return run.outcome() is None and not RunStatus(run.raw_status).is_stopping


def stop_unless_deferred(
    ti: TaskInstanceLike | None,
    get_client: Callable[[], Client],
    run_name: str,
    marker: str,
    *,
    abort: bool,
    when_unknown: Literal["stop", "leave"],
    log: Any,
) -> None:
    """Stop a killed task's run, but not that of a task which still waits for it.

    Airflow also kills a trigger that another triggerer has taken over while this one was stalled; then the
    task is still ``deferred``. ``when_unknown`` is for a state that cannot be told.
    """
    try:
        state = task_state(ti) if ti is not None else None
    except Exception as error:
        if when_unknown == "leave":
            log.warning("The state of the task cannot be told (%r); run %s is not stopped", error, run_name)
            return
        log.error("The state of the task cannot be told (%r); run %s is stopped", error, run_name)
        state = None
    if state == "deferred":
        log.warning("The task still waits for run %s, in another triggerer; it is not stopped", run_name)
        return
    log.info("The task was ended (state %s); stopping its run %s", state, run_name)
    stop_patiently(get_client(), run_name, marker, abort=abort, log=log)
