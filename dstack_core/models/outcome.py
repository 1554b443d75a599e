"""How a run ended, and the errors for an end without success."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dstack_core.errors import DstackError
from dstack_core.models.base import known_fields
from dstack_core.models.statuses import RunStatus

_NO_CAPACITY = frozenset({"failed_to_start_due_to_no_capacity", "interrupted_by_no_capacity"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tell how a finished run ended.

    ``status`` (``RunStatus``); ``exit_status`` (int; None when the commands were not left to end, or
    the server is older than 0.19.9); ``reason`` (str, the server's own word for why) and ``message``
    (str, the same for a person); ``cost`` (USD); ``duration`` (seconds from submission to the end);
    ``instance``, ``backend``, ``region`` (str) and ``price_per_hour`` (USD) of the machine, None when
    none was had; ``url`` of the run's page on the server. Source: PROTOCOL 1.5, 1.6.
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

    @property
    def succeeded(self) -> bool:
        """Tell whether the run did what it was asked to do."""
        return self.status.is_success

    @property
    def no_capacity(self) -> bool:
        """Tell whether the run ended because no machine could be had, or one was taken away."""
        return self.reason in _NO_CAPACITY

    def raise_for_status(self) -> Self:
        """Return itself, or raise ``RunStoppedError``, ``NoCapacityError`` or ``RunFailedError``."""
        if self.succeeded:
            return self
        text = f"Run {self.run_name} {self.message}. See {self.url}"
        if self.no_capacity:
            raise NoCapacityError(text, self)
        if self.status.was_stopped:
            raise RunStoppedError(text, self)
        raise RunFailedError(text, self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read back what ``to_dict`` gave, here or in another version.

        A field that this version does not know is ignored; one that the other version did not know gets its
        default, else None.
        """
        known = known_fields(cls, data)
        # What a server may leave out, an older version of this package may, too.
        optional = {field.name: None for field in fields(cls) if str(field.type).endswith("| None")}
        return cls(**{**optional, **known, "status": RunStatus(data["status"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-plain values (``status`` as str)."""
        return {**asdict(self), "status": str(self.status)}


class RunError(DstackError):
    """Report that a run ended without success; ``outcome`` is its ``Outcome``."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome

    def __reduce__(self) -> tuple[type[RunError], tuple[str, Outcome]]:
        """Keep ``outcome`` when the error crosses a process border."""
        return type(self), (self.message, self.outcome)


class RunFailedError(RunError):
    """Report that the run's command exited non-zero, or its job failed."""


class NoCapacityError(RunError):
    """Report that no machine for the run could be had; trying again later may succeed."""


class RunStoppedError(RunError):
    """Report that the run was stopped or aborted."""
