"""What a caller asks of a stop, and what it gets: the terms of ``_flow.stop``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import ServerError
from dstack_core.models.stops import StopResult


class Check(Enum):
    """The condition of a stop: what must be known of the run before it is sent.

    * ``NEVER``: no other run can have the name, so the stop is the first request.
    * ``IF_ANSWERED``: the caller saw the run active as its own. The check and the stop share the time: an
      unanswered check does not prevent the stop, since only a run that ended meanwhile could have lost its
      name.
    * ``ALWAYS``: without an answer nothing is stopped.
    """

    NEVER = "never"
    IF_ANSWERED = "if answered"
    ALWAYS = "always"


class Until(Enum):
    """The end of watching a stop: the server accepted it, shows it, or the run has ended."""

    ACCEPTED = "accepted"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class StopTarget:
    """The run to stop: by name, and by marker or id where these are known."""

    name: str
    marker: str | None = None
    run_id: str | None = None

    def is_met_by(self, run: RunSnapshot) -> bool:
        """Whether the run of that name is the one that is meant."""
        # The server stops by name, and a name can pass to another run: the id, then the marker, decides.
        if self.run_id is not None:
            return run.id == self.run_id
        return self.marker is None or run.marker == self.marker


@dataclass(frozen=True, slots=True)
class StopOptions:
    """Options of ``stop``.

    ``timeout`` (seconds on ``clock``) bounds everything; None leaves that to the caller that retries the
    flow's calls, and lets their errors through. ``may_appear``: a submission may still be under way, so a
    missing run is polled until the time has passed. ``abort`` ends the run without a grace period.
    ``on_accepted`` is called once, as soon as the server has accepted a stop and the run's id is known.
    """

    clock: Callable[[], float]
    abort: bool = False
    timeout: float | None = None
    check: Check = Check.ALWAYS
    until: Until = Until.ACCEPTED
    may_appear: bool = False
    on_accepted: Callable[[StopResult], None] | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """The result of a stop, and the error behind a refused or unconfirmed one, if there is an error."""

    result: StopResult
    failure: ServerError | None = None
