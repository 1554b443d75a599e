"""The checks of arguments that all tasks and the decorators share; each raises ``ConfigurationError``."""

from __future__ import annotations

from typing import Any, NoReturn


def check_pace(poll_interval: Any, retry_budget: Any) -> None:
    """Raise ``ConfigurationError`` for what is not a number of seconds in range."""
    wanted = "more than 0 seconds"
    _check("poll_interval", poll_interval, _is_number(poll_interval) and poll_interval > 0, wanted)
    check_least_seconds(retry_budget=retry_budget)


def check_seconds(**given: object) -> None:
    """Raise ``ConfigurationError`` for the first that is not a number of seconds above 0."""
    for name, value in given.items():
        _check(name, value, _is_number(value) and value > 0, "more than 0 seconds")  # type: ignore[operator]


def check_least_seconds(**given: object) -> None:
    """Raise ``ConfigurationError`` for the first that is not a number of seconds, 0 or more."""
    for name, value in given.items():
        _check(name, value, _is_number(value) and value >= 0, "0 seconds or more")  # type: ignore[operator]


def check_log_budget(value: object) -> None:
    """Raise ``ConfigurationError`` for what is not a number of bytes."""
    is_fine = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    _check("log_budget_bytes", value, is_fine, "bytes of log, 0 or more, or None for all of it")


def check_on_crash(value: object) -> None:
    """Raise ``ConfigurationError`` for anything but ``"stop"`` and ``"keep"``."""
    _check("on_crash", value, value in ("stop", "keep"), '"stop" or "keep"')


def check_switches(**switches: object) -> None:
    """Raise ``ConfigurationError`` for the first that is not a bool: the text "no" counts as True."""
    for name, value in switches.items():
        _check(name, value, isinstance(value, bool), "True or False")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(name: str, value: object, is_fine: bool, wanted: str) -> None:
    if not is_fine:
        _refuse(f"{name}: expected {wanted}, got {value!r}.")


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
