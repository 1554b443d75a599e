"""The tree of what this provider raises in a task; a retry policy can distinguish the classes.

::

    AirflowException
    ├── AirflowFailException      input or access is wrong: no retry can help
    └── DstackError
        ├── DstackRunError            the run ended and did not succeed
        │   ├── DstackRunFailed           its command or job failed
        │   │   ├── DstackUserError           its command, code, image or another input is wrong
        │   │   ├── DstackLimitExceeded       it passed a limit, such as max_duration
    │   │   │   └── DstackCostLimitReached    it cost as much as max_cost; also an AirflowFailException
        │   │   └── DstackInfrastructureError     its machine, volume, gateway or server failed
        │   ├── DstackNoCapacity          no machine could be had
        │   │   ├── DstackNoFleet             no fleet of the project can take it
        │   │   └── DstackSpotInterrupted     its spot machine was taken away
        │   └── DstackRunStopped          it was stopped or aborted from outside
        ├── DstackServerUnreachable   the server did not answer for longer than the retry budget
        └── DstackRunInterrupted      the task ended before its run did
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airflow_provider_dstack._compat import AirflowException, AirflowFailException

__all__ = [
    "AirflowFailException",
    "DstackCostLimitReached",
    "DstackError",
    "DstackInfrastructureError",
    "DstackLimitExceeded",
    "DstackNoCapacity",
    "DstackNoFleet",
    "DstackRunError",
    "DstackRunFailed",
    "DstackRunInterrupted",
    "DstackRunStopped",
    "DstackServerUnreachable",
    "DstackSpotInterrupted",
    "DstackUserError",
]


class DstackError(AirflowException):  # type: ignore[misc, unused-ignore]  # untyped in some Airflow versions
    """The root of what goes wrong with a run or its server; the task may be retried."""


class DstackRunError(DstackError):
    """A run that did not succeed; ``outcome`` is as ``dstack_core.Outcome.to_dict`` gives it.

    ``last_lines`` are the last lines of its log; the message has them only if the task's log does not.
    """

    def __init__(self, message: str, outcome: Mapping[str, Any], last_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.outcome = dict(outcome)
        self.last_lines = list(last_lines)

    @property
    def category(self) -> str:
        """The failure category, such as ``user.out_of_memory``; empty if the outcome has none."""
        return str(self.outcome.get("category") or "")

    def __reduce__(self) -> tuple[type[DstackRunError], tuple[str, dict[str, Any], list[str]]]:
        """Keep all of it when the error crosses a process border."""
        return type(self), (str(self), self.outcome, self.last_lines)


class DstackRunFailed(DstackRunError):
    """A run whose command exited non-zero, or whose job failed."""


class DstackUserError(DstackRunFailed):
    """A run that failed by its command, code, image or another input; another try fails the same way."""


class DstackLimitExceeded(DstackRunFailed):
    """A run that passed a limit of its configuration or server; another try pays for it again."""


class DstackCostLimitReached(DstackLimitExceeded, AirflowFailException):
    """A run that was stopped at its ``max_cost``: as an ``AirflowFailException``, it is not tried again."""


class DstackInfrastructureError(DstackRunFailed):
    """A run whose machine, container, volume, gateway or server failed; another try may succeed."""


class DstackNoCapacity(DstackRunError):
    """A run for which there was no machine, or whose machine was taken away; a later try may succeed."""


class DstackNoFleet(DstackNoCapacity):
    """A run that no fleet of the project can take: it has none, or none that matches the run."""


class DstackSpotInterrupted(DstackNoCapacity):
    """A run whose spot machine was taken away; a later try may succeed."""


class DstackRunStopped(DstackRunError):
    """A run that was stopped or aborted, and not by its task."""


class DstackServerUnreachable(DstackError):
    """A server that gave no usable reply within the retry budget."""


class DstackRunInterrupted(DstackError):
    """A task that was killed, or lost sight of its run, before the run ended."""
