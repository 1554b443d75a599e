"""Stop the run of a task, and ask Airflow whether it is to be stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from airflow_provider_dstack._compat import task_state

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskInstanceLike
    from dstack_core import Client
    from dstack_core.integration import RunRef, StopResult

OnKillAction = Literal["stop", "abort", "keep"]
ON_KILL_ACTIONS: tuple[str, ...] = get_args(OnKillAction)

# Airflow's supervisor kills the process 5 s after SIGTERM (measured on 3.2 and 3.3). The last line of the
# stop must be in the log before that; with more seconds, a slow stop is cut off without a word about the run.
KILL_SECONDS = 4.0
# Where Airflow sets no limit, a stop has the connection's own timeout, and at least the time in which a
# server that drops three stops gets a fourth (one every 5 s).
_LEAST_STOP_SECONDS = 30.0
# What else stops a run whose stop was not confirmed.
_BACKSTOP = "A DstackReapOperator, where one is scheduled, stops it at its next pass"
KEEP_ASKED_FOR = "on_kill_action is 'keep'"

ENDED_STATES = frozenset({"failed", "success", "skipped", "upstream_failed", "removed"})


def was_ended(ti: TaskInstanceLike) -> bool:
    """Return whether a user ended the task that still runs; False when Airflow cannot be asked."""
    try:
        # A task that is cleared while it runs is restarting until its process has ended.
        return task_state(ti) in ENDED_STATES | {"restarting"}
    except Exception:
        return False


def stop_seconds(client: Client) -> float:
    """Return the seconds that a stop has where Airflow sets no limit."""
    return max(client.timeout, _LEAST_STOP_SECONDS)


def stop_task_run(
    client: Client,
    ref: RunRef,
    *,
    action: OnKillAction,
    log: Any,
    timeout: float | None = None,
    run_id: str | None = None,
    submitted: bool = True,
) -> StopResult:
    """Stop a task's run; log what happens and return what is known of it. Raises no server error.

    ``timeout`` (seconds) defaults to ``stop_seconds``. Without ``submitted`` the submission may still be
    under way, or have been refused.
    """
    from dstack_core.integration import stop_run

    return stop_run(
        client,
        ref,
        timeout=stop_seconds(client) if timeout is None else timeout,
        run_id=run_id,
        submitted=submitted,
        may_appear=not submitted,
        abort=action == "abort",
        log=log,
        backstop=_BACKSTOP,
    )


def log_kept(run_name: str, why: str, page: str, log: Any) -> None:
    """Log that a run outlives its task, and where to find it."""
    log.warning("Run %s keeps running: %s. Its page: %s", run_name, why, page)


def is_to_be_stopped(
    ti: TaskInstanceLike | None, run_name: str, *, when_unknown: Literal["stop", "leave"], log: Any
) -> bool:
    """Return whether a killed trigger's run is to be stopped: not that of a task which still waits for it.

    Airflow also kills a trigger that another triggerer has taken over while this one was suspended; then the
    task is still ``deferred``. ``when_unknown`` is for a state that Airflow does not report.
    """
    try:
        state = task_state(ti) if ti is not None else None
    except Exception as error:
        if when_unknown == "leave":
            log.warning("Could not get the task's state (%r). Run %s keeps running.", error, run_name)
            return False
        log.warning("Could not get the task's state (%r). Its run %s is stopped.", error, run_name)
        return True
    if state == "deferred":
        log.warning("The task waits for run %s in another triggerer. The run keeps running.", run_name)
        return False
    log.info("The task was ended (state %s).", state)
    return True
