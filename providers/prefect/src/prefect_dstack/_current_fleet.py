"""The fleet that runs use by default: the one whose ``with dstack_fleet(...)`` the code is in.

A context variable, not a global: two flows of one process, or two branches of an async flow, each have their
own. Prefect copies the context into the tasks that a flow calls, submits or maps to threads; tasks of Dask,
Ray and process pools run in other processes, which have no such variable.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core import Configuration, Profile

_fleet: ContextVar[str | None] = ContextVar("prefect_dstack_fleet", default=None)


def enter_fleet(name: str) -> Token[str | None]:
    """Use the fleet of that name by default from here on; ``leave_fleet`` takes what is returned."""
    return _fleet.set(name)


def leave_fleet(token: Token[str | None]) -> None:
    """Use what was used before ``enter_fleet``."""
    _fleet.reset(token)


def with_current_fleet(configuration: Configuration, profile: Profile) -> Configuration:
    """Return the configuration with the fleet of the ``with`` unless it or the profile names fleets."""
    name = _fleet.get()
    if name is None or configuration.fleets is not None or profile.fleets is not None:
        return configuration
    return configuration.model_copy(update={"fleets": [name]})
