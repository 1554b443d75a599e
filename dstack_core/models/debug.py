"""A run whose container is held after its commands have failed: what it reports, and how to get in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A held run is a failed run that still has its machine; the messages of its begin and its end.
HELD, RELEASED = "held", "released"
# How the command begins that holds the container: by it a run is known of which to expect a ``held`` message.
HOLD_PREFIX = "dstack_hold_seconds="


@dataclass(frozen=True, slots=True)
class Hold:
    """The option ``debug_on_failure`` of an engine, and the exit statuses that do not hold.

    Attributes:
        duration: The option itself: seconds (int), a str such as ``"30m"``, or None.
        but_not: The exit statuses with which the container is not held (0 to 255).

    Example:
        ``client.runs.submit(configuration, debug_on_failure=Hold("30m", but_not=(99,)))``
    """

    duration: int | str | None
    but_not: tuple[int, ...] = ()


def attach_command(run_name: str, node: int = 0) -> str:
    """Return the one line that opens a shell in a run's container; it reads dstack's own configuration.

    ``node``: which one of several, from 0.
    """
    return f"python -m dstack_core attach {run_name}" + (f" --node {node}" if node else "")


def hold_note(command: str) -> str:
    """Return the line that an error adds whose run is held; empty without a command."""
    return f"\nIts container is held. To open a shell in it: {command}" if command else ""


def is_held(fields: Mapping[str, Any]) -> bool:
    """Whether the fields are those of a ``held`` message."""
    return (
        _is_whole(fields.get("exit_status"))
        and _is_whole(fields.get("seconds"))
        and isinstance(fields.get("done"), str)
        and _is_whole(fields.get("nodes", 1))
        and _is_whole(fields.get("node", 0))
    )


def is_released(fields: Mapping[str, Any]) -> bool:
    """Whether the fields are those of a ``released`` message."""
    return _is_whole(fields.get("seconds"))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
