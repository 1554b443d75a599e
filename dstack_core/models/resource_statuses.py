"""The table of the statuses of fleets, their machines and volumes (PROTOCOL 1.2).

A status that only a newer server has is taken for one on the way: it is neither usable nor over.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Stage(Enum):
    """Where a fleet, a machine or a volume is between its creation and its end."""

    COMING = "coming"
    USABLE = "usable"
    ENDING = "ending"
    ENDED = "ended"


FLEET: Mapping[str, Stage] = {
    "submitted": Stage.USABLE,
    "active": Stage.USABLE,
    "terminating": Stage.ENDING,
    "terminated": Stage.ENDED,
    "failed": Stage.ENDED,
}
INSTANCE: Mapping[str, Stage] = {
    "pending": Stage.COMING,
    "provisioning": Stage.COMING,
    "idle": Stage.USABLE,
    "busy": Stage.USABLE,
    "terminating": Stage.ENDING,
    "terminated": Stage.ENDED,
}
VOLUME: Mapping[str, Stage] = {
    "submitted": Stage.COMING,
    "provisioning": Stage.COMING,
    "active": Stage.USABLE,
    "failed": Stage.ENDED,
}


def stage_of(table: Mapping[str, Stage], status: str) -> Stage:
    """Return the stage that a status of the server means."""
    return table.get(status, Stage.COMING)
