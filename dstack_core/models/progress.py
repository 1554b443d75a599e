"""The position up to which a run was followed: plain values, enough to continue in another process.

Log messages have no number of their own, only a timestamp, and several may have the same. So a cursor is the
timestamp of the last message and how many messages of that timestamp were read (PROTOCOL 1.8). A line whose
end was not read yet is kept in it, because the part that was read will not be sent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from dstack_core.models.base import known_fields
from dstack_core.models.debug import HELD, RELEASED
from dstack_core.models.reports import MAX_METRICS, metric_values, plain_number

if TYPE_CHECKING:
    from dstack_core.models.utilization import UtilizationSoFar


@dataclass(frozen=True, slots=True)
class LogCursor:
    """The position up to which the log of one job submission was read.

    Attributes:
        after: The timestamp of the last message that was read; None: nothing yet.
        seen_at_after: How many messages with that timestamp were read.
        pending: The bytes of a line whose end has not come yet, in base64.
        drained: Whether nothing more can come.
        reported: How many messages behind this position were reported already (int).
        parts: The parts of messages that are not complete yet, by id.
        shown: Whether ``pending`` was reported as it is now, in a ``PartialLine``.

    Source: PROTOCOL 1.8.
    """

    after: str | None = None
    seen_at_after: int = 0
    pending: str = ""
    drained: bool = False
    reported: int = 0
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shown: bool = False


@dataclass(frozen=True, slots=True)
class ReportedSoFar:
    """What a run has reported so far: part of its outcome once it has ended.

    Attributes:
        results: The result that was reported last, in a tuple; empty without one, as a result may be None.
        metrics: The last value of each metric, by name; at most 1000.
        dropped: How many messages were dropped.
        held: The ``held`` message with its ``attempt``, of a run with ``debug_on_failure`` whose commands
            have failed; else empty.
        released: Seconds for which that container was held; None while it is held.
        count: How many messages were reported, of any kind.
    """

    results: Sequence[Any] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: int = 0
    held: Mapping[str, Any] = field(default_factory=dict)
    released: int | None = None
    count: int = 0

    def with_hold(self, kind: str, payload: Mapping[str, Any], attempt: int) -> Self:
        """Return a copy that knows that a container is held, or no longer; of several nodes the first."""
        if kind == HELD and self.held.get("attempt") != attempt:
            return replace(self, held={**payload, "attempt": attempt}, released=None)
        if kind == RELEASED and self.held.get("attempt") == attempt:
            return replace(self, released=max(payload["seconds"], self.released or 0))
        return self

    def with_message(self, kind: str, payload: Mapping[str, Any]) -> Self:
        """Return a copy that knows one more message."""
        one_more = replace(self, count=self.count + 1)
        if kind == "result":
            return replace(one_more, results=(payload["value"],))
        if kind == "metric":
            merged = {**self.metrics, **metric_values(payload)}
            return replace(one_more, metrics=dict(list(merged.items())[:MAX_METRICS]))
        return one_more

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has."""
        metrics = {name: plain_number(value) for name, value in self.metrics.items()}
        return {
            "results": list(self.results),
            "metrics": metrics,
            "dropped": self.dropped,
            "held": dict(self.held),
            "released": self.released,
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` wrote, in this or another version."""
        known = known_fields(cls, data)
        metrics = {name: float(value) for name, value in known.get("metrics", {}).items()}
        return cls(**{**known, "results": tuple(known.get("results", ())), "metrics": metrics})


@dataclass(frozen=True, slots=True)
class Progress:
    """The position up to which a run was followed.

    Attributes:
        run_name: The run's name.
        run_id: The run's id (a UUID), None until it is known.
        status: The status that was reported last (str), or None.
        cursors: The log positions by job submission id.
        stopping_since: When the run was first seen stopping, in seconds since the epoch, or None.
        reported: What the run has reported so far.
        utilization: What was measured of it so far, None before the first values are read.
        since: When each status was seen first, in seconds since the epoch, by status.
    """

    run_name: str
    run_id: str | None = None
    status: str | None = None
    cursors: Mapping[str, LogCursor] = field(default_factory=dict)
    stopping_since: float | None = None
    reported: ReportedSoFar = ReportedSoFar()
    utilization: UtilizationSoFar | None = None
    since: Mapping[str, float] = field(default_factory=dict)

    def cursor(self, submission_id: str) -> LogCursor:
        """Return the cursor of a job submission; a new one if its log was not read yet."""
        return self.cursors.get(submission_id, LogCursor())

    def with_cursor(self, submission_id: str, cursor: LogCursor) -> Self:
        """Return a copy with that job submission's cursor, or itself if it has that cursor already."""
        if self.cursors.get(submission_id) == cursor:
            return self
        return replace(self, cursors={**self.cursors, submission_id: cursor})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has."""
        measured = None if self.utilization is None else self.utilization.to_dict()
        plain = asdict(replace(self, utilization=None))
        return {**plain, "reported": self.reported.to_dict(), "utilization": measured}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the position that ``to_dict`` wrote, in this or another version.

        A field that this version does not know is ignored; a missing one has its default.
        """
        cursors = {
            key: LogCursor(**known_fields(LogCursor, cursor))
            for key, cursor in data.get("cursors", {}).items()
        }
        reported = ReportedSoFar.from_dict(data.get("reported") or {})
        known = {**known_fields(cls, data), "cursors": cursors, "reported": reported}
        if known.get("utilization") is not None:
            # Of a run that was followed for an hour; others pass by that module.
            from dstack_core.models.utilization import UtilizationSoFar

            known["utilization"] = UtilizationSoFar.from_dict(known["utilization"])
        return cls(**known)
