"""The values that runs may print although they are not in their environment: those of ``sync_secrets``.

A run has a reference, ``${{ secrets.NAME }}``. Whatever relays its log here, in its block or after it, in
this thread or another, finds the value by that name. Another process does not know it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar, Token

_values: ContextVar[tuple[str, ...]] = ContextVar("prefect_dstack_secrets", default=())
# By the name of the project secret; two projects may have one of the same name. A run may be followed after
# its block, so nothing is taken out: a process has as many as it has set.
_set_here: dict[str, set[str]] = {}
_REFERENCE = re.compile(r"\$\{\{\s*secrets\.([\w-]+)\s*\}\}")


def enter_secrets(values: Mapping[str, str]) -> Token[tuple[str, ...]]:
    """Mask these, too, from here on; ``leave_secrets`` takes what is returned.

    ``values`` has the values by the names of the project secrets.
    """
    for name, value in values.items():
        _set_here.setdefault(name, set()).add(value)
    return _values.set((*_values.get(), *values.values()))


def leave_secrets(token: Token[tuple[str, ...]]) -> None:
    """Mask what was masked before ``enter_secrets``, and what a run refers to."""
    _values.reset(token)


def current_secrets() -> tuple[str, ...]:
    """Return the values to mask in a run that is submitted here."""
    return _values.get()


def values_behind(env: Mapping[str, str]) -> list[str]:
    """Return the values of the project secrets that an environment refers to, if they were set here."""
    names = {name for text in env.values() for name in _REFERENCE.findall(text)}
    return [value for name in sorted(names) for value in _set_here.get(name, ())]
