"""Other machines for a job whose run ended for lack of one: the next step, within the same try of the engine.

The problem: dstack starts a run again with the resources that it was submitted with. A run that should move
from spot machines to on-demand ones, or to more memory after exit status 137, has to be another run. A
process may be lost between the end of one and the submission of the next, and any other may take over.

The idea: step 1 is the run of the job. Step k has a name and a marker that are made of those of step 1, and
what follows a step depends on the outcome of that run alone. So each process that follows the steps, one
after the other, makes the same choices: a step that another process has submitted is found by its name and
marker, as every submission is, and what has ended is not submitted again.

Invariants: a step is submitted only after the end of the one before was seen, so one run of the job is alive
at most. ``Attempt.ref`` names, at any moment, the run that an interrupted caller has to stop. A run that was
stopped, or that is held for a shell, has no next step. Source: PROTOCOL 1.4, 1.6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dstack_core.errors import ConfigurationError, RunNotFoundError
from dstack_core.integration.attempts import Attempt
from dstack_core.integration.names import RunRef, step_ref
from dstack_core.integration.step_sums import StepSums
from dstack_core.models.events import Event, LogLines, PartialLine, Reported, RunFinished
from dstack_core.models.failure_categories import in_categories

if TYPE_CHECKING:
    from dstack_core.aio import AsyncClient
    from dstack_core.aio_run import AsyncRun
    from dstack_core.client import Client
    from dstack_core.configurations import ConfigurationLike
    from dstack_core.models.outcome import Outcome
    from dstack_core.models.progress import Progress
    from dstack_core.run import Run

_NEXT = "next"
# The groups of failure categories that other machines may help with.
_OTHER_MACHINES = ("spot", "capacity", "machine")

EventT = TypeVar("EventT", bound=Event)
RunT = TypeVar("RunT", "Run", "AsyncRun")


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """What a job is submitted with after its run ended for lack of a machine, or with certain exit statuses.

    Attributes:
        options: The submit options of step 2, step 3 and so on (dicts), which replace those of the same name
            that the first run has: ``[{"spot_policy": "on-demand"}, {"resources": "80GB.."}]``. ``{}`` begins
            again with those of the first run.
        on_exit: Exit statuses that lead to another step, too, such as ``{137: "next"}`` for a lack of memory:
            to the next one, or to that of a number from 2 on. Needs dstack 0.19.9, which reports them.

    Raises:
        ConfigurationError: A value is wrong.

    Example:
        ``Fallbacks([{"spot_policy": "on-demand"}], on_exit={137: "next"})``
    """

    options: Sequence[Mapping[str, Any]]
    on_exit: Mapping[int, int | Literal["next"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.options or not all(isinstance(each, Mapping) for each in self.options):
            raise ConfigurationError(
                'fallbacks: expected a list of dicts of submit options such as {"spot_policy": "on-demand"}, '
                f"got {self.options!r}."
            )
        for status, target in self.on_exit.items():
            if not _is_whole(status) or not 1 <= status <= 255:
                raise ConfigurationError(
                    f"on_exit: expected exit statuses from 1 to 255, got {status!r}. A run that exits with 0 "
                    "has succeeded."
                )
            if target not in (_NEXT, *range(2, self.last + 1)) or isinstance(target, bool):
                raise ConfigurationError(
                    f'on_exit: expected "next" or the number of a step, 2 to {self.last}, for {status}, got '
                    f"{target!r}."
                )

    @property
    def last(self) -> int:
        """The number of the last step; the first run is step 1."""
        return len(self.options) + 1

    def changes(self, number: int) -> Mapping[str, Any]:
        """Return the options of a step that differ from those of step 1.

        A step that an earlier version of the job had, with more fallbacks, is taken for the last one.
        """
        return {} if number == 1 else self.options[min(number, self.last) - 2]

    def describe(self, number: int) -> str:
        """Return those options for a log line: ``spot_policy=on-demand, max_price=2.0``."""
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.changes(number).items())
        return shown or "the same options"

    def step_after(self, number: int, outcome: Outcome) -> int | None:
        """Return the number of the step that follows the end of a step, None if the job has ended with it.

        No step is repeated: with ``{137: 2}``, exit status 137 in step 3 ends the job.
        """
        if outcome.succeeded or outcome.status.was_stopped or outcome.debug_command:
            return None
        target: int | str | None = self.on_exit.get(outcome.exit_status or 0)
        if target is None and in_categories(outcome.category, _OTHER_MACHINES):
            target = _NEXT
        if target is None:
            return None
        following = number + 1 if target == _NEXT else int(target)
        return following if number < following <= self.last else None


class Steps:
    """What is known of the steps of a job so far, and which one is next; no I/O.

    ``follow_steps`` and the adapters of engines do the requests, in this order: ``begin`` before a step is
    submitted with ``options``, ``seen`` with its run, ``counted`` for its events, ``end`` with the last of
    them. A process that begins with a later step first gets the runs of ``before`` and passes them to
    ``add_earlier``.

    Args:
        client: The client of the runs' project.
        configuration: The job's configuration.
        attempt: Its ``ref`` is the identity of step 1. It is kept up to date with the step that is next.
        fallbacks: What the later steps are submitted with.
        options: The submit options of step 1.
        progress: The progress of an earlier event of any step. Default: from the start.

    Raises:
        ConfigurationError: Input of any step is wrong.
    """

    def __init__(
        self,
        client: Client | AsyncClient,
        configuration: ConfigurationLike,
        attempt: Attempt,
        fallbacks: Fallbacks,
        options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._first, self._attempt = attempt.ref, attempt
        self.fallbacks = fallbacks
        self._given = dict(options or {})
        self._number = 1
        self._progress = progress
        self.sums = StepSums()
        # The end of the step before.
        self._end: RunFinished | None = None
        for number in range(1, fallbacks.last + 1):
            try:
                # It checks the input before it returns; no request is made.
                client._operations.plan(configuration, self._options_of(number)).close()
            except ConfigurationError as error:
                if number == 1:
                    raise
                raise ConfigurationError(f"fallbacks[{number - 2}]: {error.message}") from None
        if progress is not None:
            self._number = self._number_of(progress.run_name)

    def start(self, first: RunRef, number: int = 1, sums: StepSums | None = None) -> None:
        """Make that step of the job whose step 1 is ``first`` the next one, and forget what was known.

        For an engine that finds the job of an earlier execution, at any step. ``sums`` are those of the
        steps before, where they are known; otherwise ``add_earlier`` collects them.
        """
        self._first, self._number = first, number
        self._progress = self._end = None
        self.sums = StepSums() if sums is None else sums

    @property
    def first(self) -> RunRef:
        """The identity of step 1."""
        return self._first

    @property
    def number(self) -> int:
        """The number of the step that is next, or followed."""
        return self._number

    @property
    def is_paid_for(self) -> bool:
        """Whether ``max_cost`` has something left for the step that is next."""
        left = self._left()
        return left is None or left > 0

    @property
    def progress(self) -> Progress | None:
        """The progress to continue after; a step that has none of its own begins at its start."""
        progress, self._progress = self._progress, None
        return progress

    @property
    def resumes(self) -> bool:
        """Whether the step that is next was followed before: its run exists."""
        return self._progress is not None and self._progress.run_id is not None

    def resumed(self, run: RunT | None) -> RunT:
        """Return the run that was followed before, or raise ``RunNotFoundError``."""
        known = self._progress
        assert known is not None  # noqa: S101 - only called if `resumes`
        if run is None or run.id != known.run_id:
            raise RunNotFoundError(
                f"Run {known.run_name} (id {known.run_id}) no longer exists. It was deleted, so its outcome "
                "is unknown."
            )
        return run

    @property
    def options(self) -> Any:
        """The submit options of the step that is next."""
        return self._options_of(self._number)

    def before(self) -> list[RunRef]:
        """Return the steps before the one that is followed first: another process has seen their ends."""
        return [step_ref(self._first, number) for number in range(1, self._number)]

    def add_earlier(self, ref: RunRef, run: Run | AsyncRun | None) -> None:
        """Add the run of an earlier step; one that was skipped or deleted has none."""
        outcome = None if run is None or run.marker != ref.marker else run.outcome()
        if outcome is not None:
            self.sums.add(outcome)

    def begin(self) -> RunRef:
        """Return the identity of the step that is submitted now."""
        attempt = self._attempt
        attempt.ref, attempt.run_id = step_ref(self._first, self._number), None
        attempt.may_appear = True
        return attempt.ref

    def seen(self, run: Run | AsyncRun) -> None:
        """Note the run of this step."""
        self._attempt.run_id, self._attempt.may_appear = run.id, False
        self._attempt.is_chosen = True

    def counted(self, event: EventT) -> EventT:
        """Return an event whose attempt counts on from those of the steps before."""
        return counted_on(event, self.sums.count)

    def end(
        self, event: RunFinished, on_next: Callable[[Outcome, RunRef], None] | None
    ) -> RunFinished | None:
        """Return the end of the job, or None if another step follows."""
        outcome = event.outcome
        self.sums.add(outcome)
        self._end = replace(event, outcome=self.sums.of_all(outcome))
        following = self.fallbacks.step_after(self._number, outcome)
        if following is None or not self.is_paid_for:
            return self._end
        self._number = following
        if on_next is not None:
            on_next(outcome, step_ref(self._first, following))
        return None

    def describe(self) -> str:
        """Return the step that is next in one line: ``Step 2 of 3: run train-s2 with max_price=2.0.``"""
        number, name = self._number, step_ref(self._first, self._number).name
        with_ = self.fallbacks.describe(number)
        return f"Step {number} of {self.fallbacks.last}: run {name} with {with_}."

    def refused(self, error: ConfigurationError) -> RunFinished:
        """Return the end of a job if the rest of ``max_cost`` pays for no further step, else raise."""
        if self._end is None or self._left() is None:
            raise error
        self._attempt.may_appear = False
        outcome = self._end.outcome
        message = f"{outcome.message}; no further step: {error.message.rstrip('.')}"
        return replace(self._end, outcome=replace(outcome, message=message))

    def _options_of(self, number: int) -> Any:
        options = {**self._given, **self.fallbacks.changes(number)}
        if number > 1 and (left := self._left()) is not None and left > 0:
            options["max_cost"] = left
        return options

    def _left(self) -> float | None:
        """Return what of ``max_cost`` is left, None without one."""
        most = self._given.get("max_cost")
        return None if most is None else most - self.sums.cost

    def _number_of(self, name: str) -> int:
        numbers = range(1, self.fallbacks.last + 1)
        found = [number for number in numbers if step_ref(self._first, number).name == name]
        if not found:
            raise ConfigurationError(
                f"progress: expected that of run {self._first.name} or one of its steps, got that of {name}."
            )
        return found[0]


def counted_on(event: EventT, earlier: int) -> EventT:
    """Return an event of a step whose attempt counts on from the ``earlier`` ones of the steps before."""
    if earlier and isinstance(event, LogLines | PartialLine | Reported):
        return replace(event, attempt=event.attempt + earlier)
    return event


def _shown(value: Any) -> str:
    """Return an option for a log line: as in YAML where that is short."""
    plain = value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value
    return plain if isinstance(plain, str) else repr(plain)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
