"""The tree of what this provider raises in a task; a retry policy can tell the classes apart.

::

    AirflowException
    ├── AirflowFailException      input or access is wrong: no retry can help
    └── DstackError
        ├── DstackRunError            the run is over and did not succeed
        │   ├── DstackRunFailed           its command or job failed
        │   ├── DstackNoCapacity          no machine could be had, or one was taken away
        │   └── DstackRunStopped          somebody stopped or aborted it
        ├── DstackServerUnreachable   the server was silent for longer than the retry budget
        └── DstackRunInterrupted      the task ended before its run did
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow_provider_dstack._compat import AirflowException, AirflowFailException

__all__ = [
    "AirflowFailException",
    "DstackError",
    "DstackNoCapacity",
    "DstackRunError",
    "DstackRunFailed",
    "DstackRunInterrupted",
    "DstackRunStopped",
    "DstackServerUnreachable",
]


class DstackError(AirflowException):  # type: ignore[misc, unused-ignore]  # untyped in some Airflow versions
    """Be the root of what goes wrong with a run or its server; the task may be retried."""


class DstackRunError(DstackError):
    """Report a run that did not succeed; ``outcome`` is as ``dstack_core.Outcome.to_dict`` gives it."""

    def __init__(self, message: str, outcome: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.outcome = dict(outcome)

    def __reduce__(self) -> tuple[type[DstackRunError], tuple[str, dict[str, Any]]]:
        """Keep ``outcome`` when the error crosses a process border."""
        return type(self), (str(self), self.outcome)


class DstackRunFailed(DstackRunError):
    """Report that the run's command exited non-zero, or its job failed."""


class DstackNoCapacity(DstackRunError):
    """Report that no machine for the run could be had; a later try may succeed."""


class DstackRunStopped(DstackRunError):
    """Report that the run was stopped or aborted by somebody else."""


class DstackServerUnreachable(DstackError):
    """Report that the server gave no usable answer within the retry budget."""


class DstackRunInterrupted(DstackError):
    """Report that the task was killed, or lost sight of its run, before the run was over."""
