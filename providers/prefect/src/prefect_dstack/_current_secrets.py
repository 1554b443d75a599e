"""The values that runs may print although they are not in their environment: those of ``sync_secrets``.

A context variable, as in ``_current_fleet``; the log relay masks them.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

_values: ContextVar[tuple[str, ...]] = ContextVar("prefect_dstack_secrets", default=())


def enter_secrets(values: tuple[str, ...]) -> Token[tuple[str, ...]]:
    """Mask these, too, from here on; ``leave_secrets`` takes what is returned."""
    return _values.set((*_values.get(), *values))


def leave_secrets(token: Token[tuple[str, ...]]) -> None:
    """Mask what was masked before ``enter_secrets``."""
    _values.reset(token)


def current_secrets() -> tuple[str, ...]:
    """Return the values to mask."""
    return _values.get()
