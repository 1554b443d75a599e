"""Stop a run that is ours, and no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
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
# A busy server may undo a stop that it has taken, so what became of it is looked at for this long.
_LOOKS = 3

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


class Stop(Enum):
    """Say what came of asking once."""

    MISSING = "there is no such run of ours"
    ASKED = "the server took the stop"
    STOPPING = "it had been asked before"
    OVER = "the run is over"


def stop_run(client: Client, run_name: str, marker: str, *, abort: bool) -> Stop:
    """Ask the server to stop the run of that name if it carries ``marker`` and is not ending anyway.

    A run of another owner is left alone: with a ``run_name`` of the user's it may have the same name.
    Raises the server errors.
    """
    from dstack_core import RunStatus

    run = client.runs.get(run_name)
    if run is None or run.marker != marker:
        return Stop.MISSING
    if run.outcome() is not None:
        return Stop.OVER
    if RunStatus(run.raw_status).is_stopping:
        return Stop.STOPPING
    client.runs.stop(run_name, abort=abort)
    return Stop.ASKED


def stop_patiently(client: Client, run_name: str, marker: str, *, abort: bool, log: Any) -> bool:
    """Do ``stop_run``, with three tries, until the server holds to it, which takes seconds.

    Logs what happened and tells whether nothing is left to stop.
    """
    failures = asked = looks = 0
    while failures < _TRIES and asked <= _TRIES and looks < _LOOKS:
        try:
            found = stop_run(client, run_name, marker, abort=abort)
        except Exception as error:
            failures += 1
            log.error("Stopping run %s failed, try %s of %s: %s", run_name, failures, _TRIES, error)
        else:
            if found is Stop.OVER or found is Stop.MISSING:
                if not asked:
                    log.info("Run %s need not be stopped: %s", run_name, found.value)
                return True
            if found is Stop.ASKED:
                asked, looks = asked + 1, 0
                again = " again, which had forgotten it," if asked > 1 else ""
                log.info("Asked the server%s to stop run %s", again, run_name)
            else:
                looks += 1
        time.sleep(_PAUSE_SECONDS)
    if looks == _LOOKS or (asked and failures):
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
    log: Any,
) -> None:
    """Stop a killed task's run, but not that of a task which still waits for it.

    Airflow also kills a trigger that another triggerer has taken over while this one was stalled; then the
    task is still ``deferred``. When its state cannot be told the run is stopped: a user's action is by far
    the likelier cause.
    """
    try:
        state = task_state(ti) if ti is not None else None
    except Exception as error:
        log.error("The state of the task cannot be told (%r); run %s is stopped", error, run_name)
        state = None
    if state == "deferred":
        log.warning("The task still waits for run %s, in another triggerer; it is not stopped", run_name)
        return
    log.info("The task was ended (state %s); stopping its run %s", state, run_name)
    stop_patiently(get_client(), run_name, marker, abort=abort, log=log)
