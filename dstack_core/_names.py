"""Choose run names and markers."""

from __future__ import annotations

import uuid

from dstack_core.models.configurations import Configuration


def random_run_name(configuration: Configuration) -> str:
    """Return a name nobody has yet, such as ``task-3f9a1c2b7d``."""
    kind = "dev" if configuration.type == "dev-environment" else configuration.type
    return f"{kind}-{uuid.uuid4().hex[:10]}"


def random_marker() -> str:
    """Return a marker that only this one submission has."""
    return f"dstack-core:{uuid.uuid4()}"
