"""Statuses and policies a caller names."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class RunStatus(StrEnum):
    """Name the status of a run: the documented 15, and ``PROVISIONING``.

    Members are strings, so ``"Run: " + run.status()`` works. A status that a newer server invents
    becomes a member of its own value instead of an error. Source: the documented API, "RunStatus";
    PROTOCOL 3.3 says which of them today's servers can show.
    """

    PENDING = "pending"
    SUBMITTED = "submitted"
    PROVISIONING = "provisioning"
    DOWNLOADING = "downloading"
    BUILDING = "building"
    RUNNING = "running"
    UPLOADING = "uploading"
    STOPPING = "stopping"
    STOPPED = "stopped"
    RESTARTING = "restarting"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    ABORTING = "aborting"
    ABORTED = "aborted"
    FAILED = "failed"
    DONE = "done"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not value:
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = value.upper().replace("-", "_")
        unknown._value_ = value
        return unknown

    @property
    def is_finished(self) -> bool:
        """Tell whether the run is over: done, failed, terminated, aborted or stopped."""
        return self in _FINISHED

    @property
    def is_stopping(self) -> bool:
        """Tell whether the run is on its way to an end it has not reached yet."""
        return self in _STOPPING

    @property
    def is_ending(self) -> bool:
        """Whether the run has finished or is stopping, so that there is nothing left to stop."""
        return self.is_finished or self.is_stopping


_FINISHED = frozenset(
    {RunStatus.DONE, RunStatus.FAILED, RunStatus.TERMINATED, RunStatus.ABORTED, RunStatus.STOPPED}
)
_STOPPING = frozenset({RunStatus.STOPPING, RunStatus.ABORTING, RunStatus.TERMINATING})


class SpotPolicy(StrEnum):
    """Choose between spot and on-demand instances.

    Without a policy today's servers take on-demand instances (PROTOCOL 3.2). The documented name
    ``ON_DEMAN`` is a typing error that is kept as an alias.
    """

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    ON_DEMAN = "on-demand"
    ONDEMAND = "on-demand"
    AUTO = "auto"
