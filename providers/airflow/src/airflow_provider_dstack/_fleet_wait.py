"""What a poll of a fleet shows to a task that waits for its machines, in the worker and the triggerer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dstack_core import Fleet

_ENDED = "ended"
READY, WAITING, LOST = "ready", "waiting", "lost"


class FleetSight(NamedTuple):
    """What one poll showed: ``state`` is ``READY``, ``WAITING`` or ``LOST``; ``text`` is for a person."""

    state: str
    text: str


def sight_of_fleet(name: str, mark: str, fleet: Fleet | None, machines: int) -> FleetSight:
    """Return what a poll of a fleet shows to a task that waits for so many machines."""
    if fleet is None or fleet.marker != mark:
        return FleetSight(LOST, f"Fleet {name} is no longer there; something else deleted it.")
    if fleet.is_terminating or fleet.has_ended:
        why = f" ({fleet.status_message})" if fleet.status_message else ""
        return FleetSight(LOST, f"Fleet {name} is {fleet.status}{why}.")
    ready = sum(each.is_ready for each in fleet.instances)
    others = [
        f"{each.name} {each.status}" + (f", {each.termination_reason}" if each.termination_reason else "")
        for each in fleet.instances
        if not each.is_ready
    ]
    # A fleet that finds no machine tries again and again, and lists each attempt.
    shown = f" ({'; '.join(others[-5:])})" if others else ""
    text = f"Fleet {name} has {ready} of {machines} machines{shown}."
    return FleetSight(READY if ready >= machines else WAITING, text)


def too_late(name: str, seconds: float, last: str) -> str:
    """Return the error of a fleet whose machines did not come in time."""
    return (
        f"Fleet {name}: expected its machines within {seconds:g} s, got fewer. {last} Allow more machines "
        "(other GPUs, regions or backends, spot, a higher max_price), or raise wait_timeout."
    )
