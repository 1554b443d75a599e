"""How far a run has been followed: frozen, JSON-plain, enough to go on in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from dstack_core.models.base import known_fields


@dataclass(frozen=True, slots=True)
class LogCursor:
    """Mark what was read of one job submission's log.

    ``after`` is the timestamp of the last message read (None: nothing yet), ``seen_at_after`` how many
    messages of that very timestamp were read. ``pending`` holds the bytes, base64, of a line whose end
    has not come yet. ``drained`` says that nothing more can come. Source: PROTOCOL 1.8.
    """

    after: str | None = None
    seen_at_after: int = 0
    pending: str = ""
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Mark how far a run has been followed.

    ``run_name``, ``run_id`` (None until known), ``status`` as last reported (str or None),
    ``cursors`` by job submission id, ``stopping_since`` (seconds since the epoch when the run was
    first seen stopping, or None).
    """

    run_name: str
    run_id: str | None = None
    status: str | None = None
    cursors: Mapping[str, LogCursor] = field(default_factory=dict)
    stopping_since: float | None = None

    def cursor(self, submission_id: str) -> LogCursor:
        """Return the cursor of a job submission; a new one when it was never read."""
        return self.cursors.get(submission_id, LogCursor())

    def with_cursor(self, submission_id: str, cursor: LogCursor) -> Self:
        """Return a copy with that job submission's cursor; itself where it has that already."""
        if self.cursors.get(submission_id) == cursor:
            return self
        return replace(self, cursors={**self.cursors, submission_id: cursor})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read back what ``to_dict`` gave, here or in another version.

        A field that this version does not know is ignored; a missing one has its default.
        """
        cursors = {
            key: LogCursor(**known_fields(LogCursor, cursor))
            for key, cursor in data.get("cursors", {}).items()
        }
        return cls(**{**known_fields(cls, data), "cursors": cursors})
