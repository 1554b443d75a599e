"""Check what callers pass for times and callbacks, before anything is sent."""

from __future__ import annotations

import math
from typing import Any

from dstack_core.errors import ConfigurationError


def check_seconds(name: str, value: Any, *, least: float = 0.0, above: bool = False) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is None or a number of seconds that makes sense."""
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or value < least or (above and value == least):
        wanted = f"more than {least:g} seconds" if above else f"{least:g} seconds or more"
        raise ConfigurationError(f"{name}: expected {wanted}, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name}: expected a function, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"{name}: expected one of {known}, got {value!r}.")
