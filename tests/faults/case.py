"""The input of an adapter, and what it reports about the life of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Seconds. Short, because many faults of the matrix are only noticed by this timeout; the stalls of the proxy (2 s)
# are longer.
TIMEOUT = 1.5
# Seconds. Short, because a life has at least 16 requests.
POLL_INTERVAL = 0.02


# Later attempts of a run have their number in front.
_LINE = re.compile(r"(?:\[attempt \d+\] )?(line-.*)")


def lines_in(message: str) -> list[str]:
    """Return the lines of the run in a message of a host's log."""
    found = (_LINE.fullmatch(line.strip()) for line in message.splitlines())
    return [each[1] for each in found if each is not None]


@dataclass(frozen=True)
class Case:
    """One case: the server's address for the client, the run's name and its configuration."""

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
    """What an adapter saw: the lines it got, and the status it reported or the error it raised.

    ``other_lines`` is what else it wrote to its log. ``repeated`` counts lines that are in ``lines`` once and in the
    log twice, for the one reason that docs/reliability.md names.
    """

    lines: Sequence[str]
    status: str | None
    error: BaseException | None = None
    other_lines: Sequence[str] = ()
    repeated: int = 0


@dataclass(frozen=True)
class Adapter:
    """One way to follow a run, and what it does with a run that it can no longer follow."""

    follow: Callable[[Case], Ended]
    lost_sight: Literal["leaves", "stops"] = "leaves"

    def __call__(self, case: Case) -> Ended:
        """Follow; an error that the adapter did not catch itself counts as well."""
        try:
            return self.follow(case)
        except Exception as error:
            return Ended([], None, error)
