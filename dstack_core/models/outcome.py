"""How a run ended, and the errors for a run that did not succeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, cast

from dstack_core.errors import DstackError
from dstack_core.models.base import known_fields
from dstack_core.models.debug import attach_command, hold_note
from dstack_core.models.failure_categories import category_named, describe_exit, find_category
from dstack_core.models.no_fleet import NO_FLEET, fleet_advice
from dstack_core.models.progress import ReportedSoFar
from dstack_core.models.reports import plain_number
from dstack_core.models.statuses import RunStatus, in_words

if TYPE_CHECKING:
    from dstack_core.models.outcome_dict import OutcomeDict
    from dstack_core.models.run_attempt import RunAttempt
    from dstack_core.models.utilization import Utilization

_NO_CAPACITY = frozenset({"failed_to_start_due_to_no_capacity", "interrupted_by_no_capacity"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: its status, the reason, the cost and the machine.

    Attributes:
        run_name: The run's name.
        run_id: The run's id (a UUID).
        project: The project it ran in.
        status: ``DONE``, ``FAILED``, ``TERMINATED`` or ``ABORTED``.
        exit_status: What the command exited with (int); None if it did not end by itself, or if the server is
            older than 0.19.9.
        reason: Why the run ended (str), in the server's own word, or None.
        message: Why the run ended (str), for a person.
        cost: What the run cost, in USD.
        duration: Seconds from the submission to the end, or None.
        instance: The type of its machine (str), None if it had none.
        backend: The backend of its machine (str), None if it had none.
        region: The region of its machine (str), None if it had none.
        price_per_hour: The price of its machine in USD per hour, None if it had none.
        url: The address of the run's page on the server.
        result: What the run reported as its result (values that JSON has); None also without one. Known where
            the run's log was followed.
        metrics: The last value of each metric that the run reported (floats by name), likewise.
        has_result: Whether the run reported a result, likewise.
        debug_seconds: Seconds for which its container was held after its commands had failed
            (``debug_on_failure``); at most, while it is held. Known where the run's log was followed.
        debug_cost: What these seconds cost, in USD; part of ``cost`` once the run has ended.
        debug_command: The command that opens a shell in its container; empty unless it is held.
        debug_done: The file whose creation in the container ends the hold (a path), likewise.
        utilization: How busy its GPUs, CPUs and memory were; None if it was not asked for, or if the server
            has no values.
        category: Why the run did not succeed (str), a stable name such as ``user.out_of_memory``; empty for a
            success. ``dstack_core.integration.FAILURE_CATEGORIES`` lists all.
        cause: The category's meaning, one sentence (str); empty for a success.
        next_step: What to do about it, one sentence (str); empty for a success.
        attempts: Its attempts that had a machine, oldest first, at most the last 50 (``RunAttempt``). A run
            that was never retried has one for each of its nodes.

    Source: PROTOCOL 1.5, 1.6.
    """

    run_name: str
    run_id: str
    project: str
    status: RunStatus
    exit_status: int | None
    reason: str | None
    message: str
    cost: float
    duration: float | None
    instance: str | None
    backend: str | None
    region: str | None
    price_per_hour: float | None
    url: str
    result: Any = field(default=None, repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)
    has_result: bool = False
    debug_seconds: float = 0.0
    debug_cost: float = 0.0
    debug_command: str = ""
    debug_done: str = ""
    utilization: Utilization | None = None
    category: str = ""
    cause: str = ""
    next_step: str = ""
    attempts: Sequence[RunAttempt] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        # Outcomes that an older version wrote, and those that an engine makes, have no category yet.
        if self.succeeded:
            for name in ("category", "cause", "next_step"):
                object.__setattr__(self, name, "")
            return
        if self.category and self.cause and self.next_step:
            return
        words = in_words(self.reason) or ""
        details = self.message.removeprefix(words).strip()
        if details.startswith("("):
            details = details[1:].removesuffix(")")
        found = find_category(self.reason, self.exit_status, details)
        row = category_named(self.category) if self.category else found
        for name, value in (("category", row.name), ("cause", row.cause), ("next_step", row.next_step)):
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def succeeded(self) -> bool:
        """Whether the run finished successfully."""
        return self.status.is_success

    @property
    def no_capacity(self) -> bool:
        """Whether the run ended because no machine was available, or because its machine was taken away."""
        return self.reason in _NO_CAPACITY

    def raise_for_status(self) -> Self:
        """Return itself if the run succeeded.

        Raises:
            RunInterruptedError: Its spot machine was taken away; also a ``NoCapacityError``.
            NoFleetError: No fleet of the project can take it; also a ``NoCapacityError``.
            NoCapacityError: No machine was available.
            RunStoppedError: The run was stopped or aborted.
            RunUserError: Its command, code, image or another input is wrong; also a ``RunFailedError``.
            RunLimitError: It passed a limit, such as ``max_duration``; also a ``RunFailedError``.
            RunInfrastructureError: Its machine, the server or another service failed; also a
                ``RunFailedError``.
            RunFailedError: Anything else.
        """
        if self.succeeded:
            return self
        text = f"Run {self.run_name} {self.message}. See {self.url}{hold_note(self.debug_command)}"
        if self.category == NO_FLEET:
            text = f"{text} \n{fleet_advice()} ({NO_FLEET})."
        raise self._error_class(text, self)

    @property
    def _error_class(self) -> type[RunError]:
        if self.no_capacity:
            base: type[RunError] = NoCapacityError
        else:
            base = RunStoppedError if self.status.was_stopped else RunFailedError
        # The class of the reason and status stays a base, whatever the category.
        if self.category == NO_FLEET:
            return NoFleetError if issubclass(NoFleetError, base) else base
        precise = _ERRORS.get(category_named(self.category).kind, base)
        return precise if issubclass(precise, base) else base

    def with_reports(self, reported: ReportedSoFar) -> Self:
        """Return a copy with what the run has reported, as ``Progress.reported`` of an event has it."""
        result = reported.results[0] if reported.results else None
        reports = replace(self, result=result, metrics=reported.metrics, has_result=bool(reported.results))
        # The server's word counts: a run that it shows as done has not failed.
        is_held = reported.held and not self.succeeded
        return replace(reports, **_of_hold(self, reported)) if is_held else reports

    def read_result(self) -> Any:
        """Return the result that the run reported.

        Raises:
            RunError: The run did not succeed.
            NoResultError: The run succeeded and reported no result.
        """
        self.raise_for_status()
        if not self.has_result:
            raise NoResultError(
                f"Run {self.run_name} succeeded, but reported no result that is JSON of at most 1 MiB. "
                "Submit it with reports=True, and write JSON to $DSTACK_RESULT_FILE or call "
                f"dstack_report.result(). A message that is broken is in its log: {self.url}",
                self,
            )
        return self.result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the outcome that ``to_dict`` wrote, in this or another version.

        A field that this version does not know is ignored; one that the other version did not know gets its
        default, else None.
        """
        known = known_fields(cls, data)
        # An older version of this package may have left out what a server may leave out.
        optional = {each.name: None for each in fields(cls) if str(each.type).endswith("| None")}
        metrics = {name: float(value) for name, value in (known.get("metrics") or {}).items()}
        if known.get("utilization") is not None:
            from dstack_core.models.utilization import Utilization

            known["utilization"] = Utilization.from_dict(known["utilization"])
        if known.get("attempts"):
            from dstack_core.models.run_attempt import RunAttempt

            known["attempts"] = tuple(map(RunAttempt.from_dict, known["attempts"]))
        else:
            known.pop("attempts", None)
        return cls(**{**optional, **known, "status": RunStatus(data["status"]), "metrics": metrics})

    def to_dict(self) -> OutcomeDict:
        """Return the fields as values that JSON has: ``status`` as str, a metric of NaN as ``"nan"``."""
        metrics = {name: plain_number(value) for name, value in self.metrics.items()}
        measured = None if self.utilization is None else self.utilization.to_dict()
        plain = asdict(replace(self, utilization=None, attempts=()))
        attempts = [each.to_dict() for each in self.attempts]
        own = {
            "status": str(self.status),
            "metrics": metrics,
            "utilization": measured,
            "attempts": attempts,
        }
        return cast("OutcomeDict", {**plain, **own})


def _of_hold(outcome: Outcome, reported: ReportedSoFar) -> dict[str, Any]:
    """Return what changes for a run whose container was held: its commands have failed, whatever came after.

    While the run is active, it shows how to get in.
    """
    held, released = reported.held, reported.released
    seconds = float(held["seconds"] if released is None else released)
    if released is None and not outcome.status.is_active and outcome.duration is not None:
        # It was stopped, and the server did not read the last lines of its log.
        seconds = min(seconds, outcome.duration)
    is_held = released is None and not outcome.status.is_ending
    return {
        "status": RunStatus.FAILED,
        "exit_status": held["exit_status"],
        "reason": "container_exited_with_error",
        "message": describe_exit(held["exit_status"]),
        # They follow from the new end.
        "category": "",
        "cause": "",
        "next_step": "",
        "debug_seconds": seconds,
        "debug_cost": round(seconds / 3600 * (outcome.price_per_hour or 0.0) * held.get("nodes", 1), 6),
        "debug_command": attach_command(outcome.run_name, held.get("node", 0)) if is_held else "",
        "debug_done": held["done"] if is_held else "",
    }


class RunError(DstackError):
    """The end of a run without success; ``outcome`` is its ``Outcome``.

    ``last_lines`` are the last lines of its log if an engine's adapter raised the error, with secrets hidden.
    """

    def __init__(self, message: str, outcome: Outcome, last_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.last_lines = tuple(last_lines)

    def __repr__(self) -> str:
        """Return the text with its line ends, since Prefect logs this and not the text."""
        return f"{type(self).__name__}: {self.message}"

    def __reduce__(self) -> tuple[type[RunError], tuple[str, Outcome, tuple[str, ...]]]:
        """Keep all of it when the error is pickled, such as for another process."""
        return type(self), (self.message, self.outcome, self.last_lines)


class RunFailedError(RunError):
    """A run whose command exited non-zero, or whose job failed."""


class NoCapacityError(RunError):
    """A run for which no machine was available; trying again later may succeed."""


class NoFleetError(NoCapacityError):
    """A run that no fleet of the project can take: it has none, or none that matches the run."""


class RunStoppedError(RunError):
    """A run that was stopped or aborted."""


class RunUserError(RunFailedError):
    """A run that failed by its command, code, image or another input; another try fails the same way."""


class RunLimitError(RunFailedError):
    """A run that passed a limit of its configuration or server; another try pays for it again."""


class RunInfrastructureError(RunFailedError):
    """A run whose machine, container, volume, gateway or server failed; another try may succeed."""


class RunInterruptedError(NoCapacityError):
    """A run whose spot machine was taken away; another try may succeed."""


class NoResultError(RunError):
    """A run that succeeded, but reported no result."""


_ERRORS: Mapping[str, type[RunError]] = {
    "user": RunUserError,
    "capacity": NoCapacityError,
    "interruption": RunInterruptedError,
    "limit": RunLimitError,
    "infrastructure": RunInfrastructureError,
    "stopped": RunStoppedError,
}
