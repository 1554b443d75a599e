"""Stop a run that is ours, and no other."""

from __future__ import annotations

import time
from contextlib import suppress
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


def was_ended(ti: TaskInstanceLike) -> bool:
    """Tell whether a user ended the task that still runs; when Airflow cannot be asked, it was not."""
    try:
        return task_state(ti) in _ENDED
    except Exception:
        return False


def stop_run(client: Client, run_name: str, marker: str, *, abort: bool) -> Run | None:
    """Ask the server to stop the run of that name if it carries ``marker``; return it if it does.

    A run of another owner is left alone: with a ``run_name`` of the user's it may have the same name.
    Raises the server errors.
    """
    run = client.runs.get(run_name)
    if run is None or run.marker != marker:
        return None
    if run.outcome() is None:
        run.stop(abort=abort)
    return run


class Stopping:
    """Stop one run in two steps: ask, which takes milliseconds, and see to it that the stop holds."""

    def __init__(self, client: Client, run_name: str, marker: str, *, abort: bool, log: Any) -> None:
        self._client = client
        self._name = run_name
        self._marker = marker
        self._abort = abort
        self._log = log
        self._run: Run | None = None

    def ask(self) -> bool:
        """Do ``stop_run`` with three tries; log what happened and tell whether the server was asked."""
        for number in range(1, _TRIES + 1):
            try:
                self._run = stop_run(self._client, self._name, self._marker, abort=self._abort)
            except Exception as error:
                self._log.error("Stopping run %s failed, try %s of %s: %s", self._name, number, _TRIES, error)
                if number < _TRIES:
                    time.sleep(_PAUSE_SECONDS)
            else:
                told = (
                    "There is no run %s to stop" if self._run is None else "Asked the server to stop run %s"
                )
                self._log.info(told, self._name)
                return True
        self._tell_the_way_out()
        return False

    def holds(self) -> bool:
        """Tell whether nothing is left to stop; looks for up to ten seconds.

        A busy server may forget a stop, and waiting repeats it.
        """
        from dstack_core import RunNotFoundError, RunStatus, WaitTimeoutError

        if self._run is None:
            return True
        try:
            with suppress(WaitTimeoutError):
                self._run.wait(INSIST_SECONDS, poll_interval=_PAUSE_SECONDS)
                return True
            self._run.refresh()
        except RunNotFoundError:
            return True
        except Exception as error:
            self._log.warning("The end of run %s was not seen: %s", self._name, error)
            return True
        if self._run.outcome() is not None or RunStatus(self._run.raw_status).is_stopping:
            return True
        self._log.error("The server forgets that run %s is to be stopped", self._name)
        self._tell_the_way_out()
        return False

    def _tell_the_way_out(self) -> None:
        self._log.error("Run %s may still be going; stop it with: dstack stop %s", self._name, self._name)


def stop_patiently(client: Client, run_name: str, marker: str, *, abort: bool, log: Any) -> bool:
    """Ask, and see to it that the stop holds, for up to ten seconds; tell whether nothing is left to stop."""
    stopping = Stopping(client, run_name, marker, abort=abort, log=log)
    return stopping.ask() and stopping.holds()


def is_to_be_stopped(
    ti: TaskInstanceLike | None, run_name: str, *, when_unknown: Literal["stop", "leave"], log: Any
) -> bool:
    """Tell whether a killed task's run is to be stopped: not that of a task which still waits for it.

    Airflow also kills a trigger that another triggerer has taken over while this one was stalled; then the
    task is still ``deferred``. ``when_unknown`` is for a state that cannot be told.
    """
    try:
        state = task_state(ti) if ti is not None else None
    except Exception as error:
        if when_unknown == "leave":
            log.warning("The state of the task cannot be told (%r); run %s is not stopped", error, run_name)
            return False
        log.error("The state of the task cannot be told (%r); run %s is stopped", error, run_name)
        return True
    if state == "deferred":
        log.warning("The task still waits for run %s, in another triggerer; it is not stopped", run_name)
        return False
    log.info("The task was ended (state %s); stopping its run %s", state, run_name)
    return True
