"""Stop a run that is ours, and no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from airflow_provider_dstack._compat import task_state

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskInstanceLike
    from dstack_core import Client

OnKillAction = Literal["stop", "abort", "keep"]
ON_KILL_ACTIONS: tuple[str, ...] = get_args(OnKillAction)

# A client that stops has seconds, not minutes: these are the limits for its requests, in seconds.
KILL_LIMITS: dict[str, float] = {"timeout": 2.0, "connect_timeout": 2.0, "retry_budget": 1.0}

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


def stop_run(client: Client, run_name: str, marker: str, *, abort: bool) -> bool:
    """Ask the server to stop the run of that name if it carries ``marker``; tell whether it does.

    A run of another owner is left alone: with a ``run_name`` of the user's it may have the same name.
    Raises the server errors.
    """
    run = client.runs.get(run_name)
    if run is None or run.marker != marker:
        return False
    if run.outcome() is None:
        client.runs.stop(run_name, abort=abort)
    return True


def stop_patiently(client: Client, run_name: str, marker: str, *, abort: bool, log: Any) -> bool:
    """Do ``stop_run`` with three tries; log what happened and tell whether nothing is left to stop."""
    for number in range(1, _TRIES + 1):
        try:
            found = stop_run(client, run_name, marker, abort=abort)
        except Exception as error:
            log.error("Stopping run %s failed, try %s of %s: %s", run_name, number, _TRIES, error)
            if number < _TRIES:
                time.sleep(_PAUSE_SECONDS)
        else:
            log.info("Asked the server to stop run %s" if found else "There is no run %s to stop", run_name)
            return True
    log.error("Run %s may still be going; stop it with: dstack stop %s", run_name, run_name)
    return False


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
