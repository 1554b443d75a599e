"""What an adapter gets, and what it tells of a run's life."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TIMEOUT = 1.5
POLL_INTERVAL = 0.02


@dataclass(frozen=True)
class Case:
    """Hold one case: where the server is for the client, the run's name and its configuration."""

    url: str
    project: str
    token: str
    name: str
    task: dict[str, Any]
    budget: float
    poll_interval: float = POLL_INTERVAL
    timeout: float = TIMEOUT

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a client."""
        return {
            "server_url": self.url,
            "project_name": self.project,
            "user_token": self.token,
            "timeout": self.timeout,
            "connect_timeout": self.timeout,
            "retry_budget": self.budget,
        }


@dataclass(frozen=True)
class Ended:
    """Hold what an adapter saw: the lines it was given and the status it told, or the error it raised.

    ``told`` is what else it wrote to its log. ``told_again`` counts lines that are in ``lines`` once, and that the
    log has twice for the one reason that the docs name.
    """

    lines: Sequence[str]
    status: str | None
    error: BaseException | None = None
    told: Sequence[str] = ()
    told_again: int = 0


@dataclass(frozen=True)
class Adapter:
    """Hold one way to follow a run, and what it does with a run that it has lost sight of."""

    follow: Callable[[Case], Ended]
    lost_sight: Literal["leaves", "stops"] = "leaves"

    def __call__(self, case: Case) -> Ended:
        """Follow; an error that the way itself did not catch is one, too."""
        try:
            return self.follow(case)
        except Exception as error:
            return Ended([], None, error)
