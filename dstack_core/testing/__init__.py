"""A pytest plugin that tests DAGs, flows and scripts against an embedded dstack server.

``pip install "dstack-core[testing]"`` installs it, and pytest loads it. Its fixtures: `dstack_server`,
`dstack_server_module` and `dstack_server_session`, `dstack_scenario`, `dstack_time`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_core.testing.server import DstackServer

__all__ = ["DstackServer"]


def __getattr__(name: str) -> Any:
    # pytest imports this package in projects that have nothing to do with dstack.
    if name in __all__:
        return getattr(import_module("dstack_core.testing.server"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
