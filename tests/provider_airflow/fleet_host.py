"""The address of each component of a fleet on this machine, as if it had a host of its own."""

from __future__ import annotations

import os

VARIABLE = "FLEET_HOST"


def address() -> str:
    """Return the address of the component that this process belongs to."""
    return os.environ.get(VARIABLE, "127.0.0.1")
