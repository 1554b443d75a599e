"""Find the run of the previous try, and decide what this try does with it.

The problem: a try that was lost (its worker, its process) may have left a run that is active, ending or done,
or a submission that is still under way. A retry should take over what can be taken over, so that the work is
not paid for twice; a cleared task must start a new run.

The idea: a try leaves a record in Airflow's task state store before it submits. Where there is no store
(before Airflow 3.3), or it fails, the runs that earlier tries would have named are looked up: names are drawn
from the task instance, and the marker on a run proves whose it is. ``DECISIONS`` is the table of what to do.

A task with ``fallbacks`` has a run for each step that it has reached. The newest of them is what the record
is about, and what is looked up. If it has ended and another step follows, the previous try was lost between
the two, and this try continues with the one that follows.

Invariants: a run without the marker of this task instance is never taken over. A run that has ended is
followed only if it succeeded. A run whose submission may be under way is submitted again under the same name,
so that the server has it once (PROTOCOL 1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._names import TaskNames, run_ref
from airflow_provider_dstack._stop import stop_seconds

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context, TaskStateStoreLike
    from dstack_core import Client, Run
    from dstack_core.integration import Fallbacks, RunRef

RECORD_KEY = "dstack_run"
# What a stop may lose to finding out a name. Longer, and a server that does not answer delays every stop.
_NAME_SECONDS = 5.0


class Decision(Enum):
    """What a try does about the run of the previous try."""

    SUBMIT = "submit a new run"
    SUBMIT_AGAIN = "submit under the name of that run, since its submission may still be under way"
    REATTACH = "follow that run"
    WAIT = "wait for the end of that run, then decide again"
    REPLACE = "stop that run, wait for its end, then decide again"
    NEXT_STEP = "submit the step that follows that run"


# By whether the task was retried or cleared, and by the state of the run. "stopping" also covers a run
# that has done its work and is being wound up: only its end shows which.
DECISIONS: Mapping[tuple[str, str], Decision] = {
    ("retried", "missing"): Decision.SUBMIT_AGAIN,
    ("retried", "active"): Decision.REATTACH,
    ("retried", "stopping"): Decision.WAIT,
    ("retried", "succeeded"): Decision.REATTACH,
    ("retried", "failed"): Decision.SUBMIT,
    ("cleared", "missing"): Decision.SUBMIT,
    ("cleared", "active"): Decision.REPLACE,
    ("cleared", "stopping"): Decision.WAIT,
    ("cleared", "succeeded"): Decision.SUBMIT,
    ("cleared", "failed"): Decision.SUBMIT,
}


@dataclass(frozen=True, slots=True)
class Record:
    """What a try leaves to the next one, as plain JSON; ``run_id`` is None until the server has the run."""

    run_name: str
    marker: str
    project: str
    try_number: int
    max_tries: int
    run_id: str | None = None

    @property
    def run(self) -> RunRef:
        """The run it is about."""
        return run_ref(self.run_name, self.marker)

    @property
    def step(self) -> int:
        """The number of the step that the run is, 1 without fallbacks."""
        from dstack_core.integration import split_step

        return split_step(self.marker)[1]

    @classmethod
    def read(cls, stored: object) -> Record | None:
        """Return the record that was stored, None for anything else; fields of other versions are ignored."""
        from dstack_core.integration import known_fields

        if not isinstance(stored, Mapping):
            return None
        try:
            return cls(**known_fields(cls, stored))
        except TypeError:
            return None


class Ledger:
    """The record of a task's run in Airflow's task state store, where there is one.

    Airflow has the store since 3.3; before, and when it fails, names and markers alone have to do. All
    methods ask the supervisor, which takes milliseconds, so they are for the helper thread.
    """

    def __init__(self, names: TaskNames, project: str, store: TaskStateStoreLike | None, log: Any) -> None:
        self.names = names
        self._project = project
        self._store = store
        self._log = log

    def write(self, run: RunRef, run_id: str | None = None) -> None:
        """Leave the record of a run to the next try; to be done before the run is submitted."""
        names = self.names
        record = Record(run.name, run.marker, self._project, names.try_number, names.max_tries, run_id)
        self._try("write", lambda store: store.set(RECORD_KEY, asdict(record)))

    def forget(self) -> None:
        """Delete the record: its run has done its work, so a cleared task must start a new one."""
        self._try("delete", lambda store: store.delete(RECORD_KEY))

    def read(self) -> Record | None:
        """Return what the previous try left, if it was about this project."""
        record = Record.read(self._try("read", lambda store: store.get(RECORD_KEY)))
        if record is not None and record.project != self._project:
            self._log.warning(
                "The previous try had run %s in project %s. That run is left alone.",
                record.run_name,
                record.project,
            )
            return None
        return record

    def is_closed(self) -> bool:
        """Return whether Airflow no longer has the record for this try, since another has replaced it."""
        try:
            return self._store is not None and self._store.get(RECORD_KEY) is None
        except Exception:
            return False

    def _try(self, what: str, ask: Callable[[TaskStateStoreLike], Any]) -> Any:
        if self._store is None:
            return None
        try:
            return ask(self._store)
        except Exception as error:
            self._log.warning(
                "Airflow's task state store failed to %s the run's record (%s). The run is found by its name "
                "alone.",
                what,
                error,
            )
            return None


def previous_run(
    ledger: Ledger, client: Client, fallbacks: Fallbacks | None = None
) -> tuple[Record, Run | None] | None:
    """Return the record of the previous try and its run, the newest step's; None for a first try.

    Without a record, the runs that earlier tries would have named are looked up: under today's names, and if
    no run has one, under those of earlier versions. Raises the server errors.
    """
    record = ledger.read()
    if record is not None:
        return record, owned(client, record.run)
    names = ledger.names
    tries = names.earlier_tries
    for name in dict.fromkeys([*map(names.name_in, tries), *map(names.former_name_in, tries)]):
        found = [
            (Record(run.name, run.marker or "", client.project, *numbers, run.id), run)
            for run in map(client.runs.get, _step_names(name, fallbacks))
            if run is not None
            and (numbers := names.read_marker(run.marker or "")) is not None
            and numbers[0] < names.try_number
        ]
        if found:
            # With a chosen name, the later steps may be those of an earlier try.
            return max(found, key=lambda one: (one[0].try_number, one[0].step))
    if not names.is_retry:
        return None
    # The submission of the previous try may still be under way.
    number, max_tries = names.try_number - 1, names.max_tries
    return Record(
        names.name_in(number), names.marker_in(number, max_tries), client.project, number, max_tries
    ), None


def _step_names(name: str, fallbacks: Fallbacks | None) -> list[str]:
    """Return the names of the runs of all steps of a job; ``name`` is that of step 1."""
    from dstack_core.integration import RunRef, step_ref

    last = 1 if fallbacks is None else fallbacks.last
    return [step_ref(RunRef(name, ""), number).name for number in range(1, last + 1)]


def owned(client: Client, run: RunRef) -> Run | None:
    """Return the run of that name if it carries the marker. Raises the server errors."""
    found = client.runs.get(run.name)
    return found if found is not None and found.marker == run.marker else None


def as_submitted(
    client: Client, run: RunRef, names: TaskNames, fallbacks: Fallbacks | None = None, log: Any = None
) -> RunRef:
    """Return the newest step of this try, under the name that an earlier version gave it, if so.

    Looked up only where no record names the run, such as after a deferral of a task that is not durable.
    """
    from dstack_core import DstackError
    from dstack_core.integration import newest_step

    former = names.former_run
    if run != names.run:
        return run
    try:
        if fallbacks is not None:
            newest = newest_step(client, run, fallbacks, retry_budget=stop_seconds(client))
            if newest != run:
                return newest
        if run == former:
            return run
        # The stop that follows has the time for retries; an answer would only correct the name.
        is_there = client.runs.get(run.name, timeout=_NAME_SECONDS) is not None
        return run if is_there or owned(client, former) is None else former
    except DstackError as error:
        if fallbacks is not None:
            log.warning(
                "Could not find out which step of run %s is the newest: %s. Check the runs whose names begin "
                "so: %s",
                run.name,
                error,
                client.run_url(),
            )
        return run


def decide(record: Record, run: Run | None, names: TaskNames, fallbacks: Fallbacks | None = None) -> Decision:
    """Return what this try does, by ``DECISIONS`` and by the step that follows a run that has failed."""
    kind = "retried" if record.max_tries == names.max_tries else "cleared"
    state = _state(run)
    outcome = None if run is None else run.outcome()
    if (kind, state) != ("retried", "failed") or fallbacks is None or outcome is None:
        return DECISIONS[kind, state]
    following = fallbacks.step_after(record.step, outcome)
    return DECISIONS[kind, state] if following is None else Decision.NEXT_STEP


def will_be_retried(context: Context, error: BaseException) -> bool:
    """Return whether Airflow will try again after ``error``, so that the next try finds the run.

    Source: Airflow documentation, "Tasks": retries, and the retry policy of Airflow 3.3.
    """
    ti = context["ti"]
    if isinstance(error, AirflowFailException) or not 0 < ti.try_number <= ti.max_tries:
        return False
    policy = getattr(context.get("task"), "retry_policy", None)
    if policy is None:
        return True
    decision = policy.evaluate(
        exception=error, try_number=ti.try_number, max_tries=ti.max_tries, context=context
    )
    return str(decision.action.value) != "fail"


def _state(run: Run | None) -> str:
    if run is None:
        return "missing"
    outcome = run.outcome()
    if outcome is not None:
        return "succeeded" if outcome.succeeded else "failed"
    return "stopping" if run.last_status.is_stopping else "active"
