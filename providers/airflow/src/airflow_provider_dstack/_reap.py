"""Find the active runs whose task has ended, and stop them.

A task stops its own run on every way out that leaves its process a few seconds. That leaves the runs whose
worker, triggerer or machine was gone by then. They are found from outside: every run carries the marker of
its task instance, and Airflow knows what became of that.

Rules, in this order; the first that applies decides:

1. A task instance that has not ended keeps its runs, those of earlier tries too: a retry takes them over.
2. ``on_kill_action="keep"`` is in the marker, and is respected.
3. Ownership is proven by the start of the DAG run, whose digest is in the marker. Without that proof
   (another Airflow, a DAG run that was deleted, or cleared after it had ended) the run is left, unless
   ``stop_unknown``.
4. A service whose task succeeded is meant to outlive it, unless ``stop_services`` and its DAG run has ended.
5. A run whose commands have failed and whose container is held for a shell is left: it ends by itself. It is
   stopped if the task was marked otherwise than failed.
6. The task must have ended ``min_age`` seconds ago: before that, it may still be stopping its run. The Task
   SDK does not report when a task instance ended, so a worker asks everything twice, ``min_age`` apart.

All questions are asked before the first stop: a server that does not answer means that nothing is stopped.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from airflow_provider_dstack._names import MarkedTask, birth_of, run_ref
from airflow_provider_dstack._stop import ENDED_STATES, stop_seconds
from airflow_provider_dstack.errors import DstackError

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskFacts
    from dstack_core import Client, Run

Action = Literal["left", "stopped", "would stop", "not stopped"]
AskAirflow = Callable[[MarkedTask], "TaskFacts | None"]

# A task that ends stops its own run: a stop takes 30 s at most by default, and a worker reports the end of
# its task some seconds late. With less, both stop the run. The operator, the command and the docs repeat the
# number.
DEFAULT_MIN_AGE = 60.0
UNKNOWN = "unknown"

# With replies that take seconds, a hundred stops one after another take an hour. More than eight at once
# would be a burst of requests for a server that is already slow.
_STOPS_AT_ONCE = 8
# A task that a user has marked otherwise needs no search for the cause of its failure.
_FAILED_STATES = frozenset({"failed", "up_for_retry"})
_ENDED_DAG_RUN = frozenset({"success", "failed"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One active run of an Airflow task: whose it is, and what was done about it.

    ``task_instance`` is ``dag/run/task[map_index]``; ``state`` its state in Airflow, ``"unknown"`` when this
    Airflow has no such task instance.
    """

    run_name: str
    url: str
    task_instance: str
    try_number: int
    state: str
    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class ReapOptions:
    """What to stop; ``min_age`` in seconds, the rest is as for ``DstackReapOperator``."""

    dry_run: bool = False
    min_age: float = DEFAULT_MIN_AGE
    stop_unknown: bool = False
    stop_services: bool = False


class _Verdict(NamedTuple):
    run: Run
    task: MarkedTask
    state: str
    stops: bool
    reason: str
    ended_at: datetime | None = None


def reap(
    client: Client,
    ask: AskAirflow,
    options: ReapOptions,
    *,
    log: Any,
    pause: Callable[[float], None] = time.sleep,
) -> list[Finding]:
    """Stop the runs whose task has ended, and return what was found, newest first.

    ``pause`` sleeps. Raises dstack's server errors, and ``DstackError`` when Airflow does not answer, in both
    cases before anything is stopped. A run that could not be stopped is a finding, not an error.
    """
    verdicts = _verdicts(client, ask, options)
    undated = {one.run.id for one in verdicts if one.stops and one.ended_at is None}
    if undated and options.min_age > 0:
        log.info(
            "Found %s of tasks that have ended. Checking again in %g s, so that a task can stop its own run.",
            _count(len(undated), "run"),
            options.min_age,
        )
        pause(options.min_age)
        verdicts = [
            _leave(one, "its task just ended")
            if one.stops and one.ended_at is None and one.run.id not in undated
            else one
            for one in _verdicts(client, ask, options)
        ]
    with ThreadPoolExecutor(_STOPS_AT_ONCE, thread_name_prefix="dstack-reap") as pool:
        # The copied context carries what Airflow's logging binds to the task.
        acts = [
            pool.submit(contextvars.copy_context().run, _act, client, one, options, log) for one in verdicts
        ]
        return [act.result() for act in acts]


def describe(finding: Finding) -> str:
    """Return a finding as one line for a person."""
    return (
        f"{finding.action.capitalize()}: run {finding.run_name} ({finding.url}) of {finding.task_instance}, "
        f"try {finding.try_number} ({finding.state}): {finding.reason}"
    )


def summary(findings: Sequence[Finding], project: str) -> str:
    """Return the count of findings by action, in one line."""
    if not findings:
        return f"No active run of an Airflow task was found in project {project}."
    actions = [finding.action for finding in findings]
    counts = ", ".join(
        f"{actions.count(one)} {'would be stopped' if one == 'would stop' else one}"
        for one in dict.fromkeys(actions)
    )
    return f"{_count(len(findings), 'active run')} of Airflow tasks in project {project}: {counts}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def failure(findings: Sequence[Finding]) -> str | None:
    """Return one message about the runs that could not be stopped, None when there are none."""
    failed = [one for one in findings if one.action == "not stopped"]
    if not failed:
        return None
    told = "; ".join(f"{one.run_name} ({one.reason}): {one.url}" for one in failed)
    return f"Reaping: expected every stop to succeed, got {len(failed)} that failed. Stop these runs: {told}"


def _verdicts(client: Client, ask: AskAirflow, options: ReapOptions) -> list[_Verdict]:
    # A list of runs shows nothing of a project that does not exist, which must not look like an all-clear.
    client.projects.get()
    found = [
        (run, MarkedTask.read(run.marker)) for run in client.runs.list() if not run.last_status.is_ending
    ]
    return [_verdict(run, task, _facts(ask, task), options) for run, task in found if task is not None]


def _facts(ask: AskAirflow, task: MarkedTask) -> TaskFacts | None:
    try:
        return ask(task)
    except Exception as error:
        raise DstackError(
            f"Airflow: expected the state of task instance {task}, got {type(error).__name__}: {error}. "
            "No run was stopped. Reap again when Airflow answers."
        ) from error


def _verdict(run: Run, task: MarkedTask, facts: TaskFacts | None, options: ReapOptions) -> _Verdict:
    state = UNKNOWN if facts is None else facts.state
    # Of an unknown task instance only the run's own age is known.
    ended_at = run.submitted_at if facts is None else facts.ended_at
    verdict = _Verdict(run, task, state, True, "its task has ended", ended_at)
    if facts is not None and facts.state not in ENDED_STATES:
        return _leave(verdict, "its task has not ended")
    if task.keep:
        return _leave(verdict, 'it was submitted with on_kill_action="keep"')
    if facts is None or birth_of(facts.dag_run_started_at) != task.born:
        why = (
            "this Airflow has no such task instance"
            if facts is None
            else "its DAG run has another start: it was cleared since, or it is another Airflow's"
        )
        if not options.stop_unknown:
            return _leave(verdict, why)
        verdict = verdict._replace(reason=why)
    if state in _FAILED_STATES and run.holds_on_failure and run.is_held():
        return _leave(verdict, "its container is held for a shell (debug_on_failure)")
    if run.service_url is not None and (facts is None or facts.state == "success"):
        if not options.stop_services:
            return _leave(verdict, "a service outlives a task that succeeded")
        if facts is not None and facts.dag_run_state not in _ENDED_DAG_RUN:
            return _leave(verdict, "a service of a DAG run that has not ended")
    if ended_at is not None:
        age = (datetime.now(UTC) - ended_at).total_seconds()
        if age < options.min_age:
            return _leave(verdict, f"its task ended {max(0.0, age):.0f} s ago")
    return verdict


def _leave(verdict: _Verdict, reason: str) -> _Verdict:
    return verdict._replace(stops=False, reason=reason)


def _act(client: Client, verdict: _Verdict, options: ReapOptions, log: Any) -> Finding:
    run = verdict.run
    action: Action = "left" if not verdict.stops else "would stop" if options.dry_run else "stopped"
    finding = Finding(
        run.name, run.url, str(verdict.task), verdict.task.try_number, verdict.state, action, verdict.reason
    )
    if action == "stopped":
        action, reason = _stop(client, run, log)
        finding = replace(finding, action=action, reason=reason or verdict.reason)
    log.info("%s", describe(finding))
    return finding


def _stop(client: Client, run: Run, log: Any) -> tuple[Action, str]:
    """Stop one run; return what was done, and why where that is not what was meant."""
    from dstack_core.integration import StopState, stop_run

    result = stop_run(
        client,
        run_ref(run.name, run.marker or ""),
        run_id=run.id,
        submitted=True,
        timeout=stop_seconds(client),
        until="stopping",
        log=log,
    )
    if result.state in (StopState.MISSING, StopState.OTHER_OWNER):
        return "left", "it was deleted meanwhile"
    return ("stopped", "") if result.is_safe else ("not stopped", result.error or str(result.state))
