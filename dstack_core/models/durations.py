"""Durations, for a person."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return a duration such as ``42 s`` or ``1 h 2 min 5 s``, rounded to whole seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
