"""The result of a stop: what is known of the run after it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dstack_core.models.outcome import Outcome


class StopState(StrEnum):
    """What is known of a run after a stop.

    Attributes:
        ENDED: The server shows that the run has ended.
        STOPPING: The server shows the run stopping.
        ACCEPTED: The server accepted the stop; its effect was not checked.
        MISSING: There is no such run.
        OTHER_OWNER: The name belongs to another run, which was left alone.
        REFUSED: The server refuses the stop, such as for a token without the right to it.
        UNCONFIRMED: None of these was seen in time; the run may still be running.
    """

    ENDED = "ended"
    STOPPING = "stopping"
    ACCEPTED = "accepted"
    MISSING = "missing"
    OTHER_OWNER = "other_owner"
    REFUSED = "refused"
    UNCONFIRMED = "unconfirmed"


@dataclass(frozen=True, slots=True)
class StopResult:
    """The result of a stop.

    Attributes:
        run_name: The run's name.
        url: The run's page, or the server's list of runs while the run's id is unknown.
        state: What is known of the run.
        requests: How many stop requests were sent.
        error: The last failure as text, None without one.
        outcome: How the run ended, None unless ``state`` is ``ENDED``.
        run_id: The run's id (a UUID), None until it is known.
    """

    run_name: str
    url: str
    state: StopState
    requests: int
    error: str | None = None
    outcome: Outcome | None = None
    run_id: str | None = None

    @property
    def is_safe(self) -> bool:
        """Whether nothing is left to stop."""
        return self.state not in (StopState.REFUSED, StopState.UNCONFIRMED)
