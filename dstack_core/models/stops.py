"""What is known of a run after a stop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dstack_core.models.outcome import Outcome


class StopState(StrEnum):
    """What is known of a run after a stop.

    ``ENDED``, ``STOPPING``: the server shows it. ``ACCEPTED``: the server took the stop and was not asked
    again. ``MISSING``: there is no such run. ``OTHER_OWNER``: the name belongs to another run, which was left
    alone. ``REFUSED``: the server refuses the stop, as to a token without the right. ``UNCONFIRMED``: none of
    these could be seen in time; the run may still be running.
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
    """What is known of a run after a stop.

    ``url`` (str) is the run's page, or the server's list of runs while the run's id is unknown. ``requests``
    (int) counts the stop requests that were sent. ``error`` (str) is the last failure in words, None without
    one. ``outcome`` is how the run ended, None unless ``state`` is ``ENDED``. ``run_id`` (str) is None until
    it is known.
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
