"""The fleet that runs use by default: the one whose ``with dstack_fleet(...)`` the code is in.

A context variable, not a global: two flows of one process, or two branches of an async flow, each have their
own. Prefect copies the context into the tasks that a flow calls, submits or maps to threads; tasks of Dask,
Ray and process pools run in other processes, which have no such variable.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core import Configuration, Profile


@dataclass(slots=True)
class BlockFleet:
    """The fleet of a block, which tasks that were submitted in the block share with it."""

    name: str
    is_open: bool = True


_fleet: ContextVar[BlockFleet | None] = ContextVar("prefect_dstack_fleet", default=None)


def enter_fleet(name: str) -> Token[BlockFleet | None]:
    """Use the fleet of that name by default from here on; ``leave_fleet`` takes what is returned."""
    return _fleet.set(BlockFleet(name))


def leave_fleet(token: Token[BlockFleet | None]) -> None:
    """Use what was used before ``enter_fleet``; a task that begins later must not use the fleet any more."""
    if (ended := _fleet.get()) is not None:
        ended.is_open = False
    _fleet.reset(token)


def with_current_fleet(configuration: Configuration, profile: Profile) -> Configuration:
    """Return the configuration with the fleet of the ``with`` unless it or the profile names fleets.

    Raises ``ConfigurationError`` in a task that was submitted in a ``with`` and began after its end.
    """
    fleet = _fleet.get()
    if fleet is None or configuration.fleets is not None or profile.fleets is not None:
        return configuration
    if not fleet.is_open:
        from dstack_core import ConfigurationError

        raise ConfigurationError(
            f"fleets: expected a fleet that exists, got {fleet.name}, whose block ended before this task "
            "began. Wait for the task inside of the block, with prefect.futures.wait or .result()."
        )
    return configuration.model_copy(update={"fleets": [fleet.name]})
