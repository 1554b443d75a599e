"""Take secrets from where Prefect keeps them, and hide them in logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.blocks.core import Block
from pydantic import Secret as PydanticSecret
from pydantic import SecretStr

_SECRET_TYPES = (SecretStr, PydanticSecret)
_HIDDEN = "***"
_SHORTEST_LINE = 5
# What Prefect itself gives to a run on a machine is no secret, apart from how to log in.
_PREFECTS = "PREFECT_"
_PREFECTS_SECRETS = ("_KEY", "_AUTH_STRING")


class Hider:
    """Write ``***`` for each line of each secret; numbers, flags and very short texts stay readable."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, values: Iterable[str | None]) -> None:
        """Hide these from now on."""
        # A flow's module is imported where nothing runs, too: that is to load no client.
        from dstack_core import secret_values

        lines = {line for value in secret_values(values) for line in value.splitlines()}
        self._lines |= {line for line in lines if len(line) >= _SHORTEST_LINE}
        if self._lines:
            longest_first = sorted(self._lines, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def hide(self, text: str) -> str:
        """Return the text without them."""
        return text if self._pattern is None else self._pattern.sub(_HIDDEN, text)


def secrets_in(env: Mapping[str, str]) -> list[str]:
    """Return the values of a run's environment that may be secrets."""
    return [
        value
        for name, value in env.items()
        if not name.startswith(_PREFECTS) or name.endswith(_PREFECTS_SECRETS)
    ]


def is_secret(value: object) -> bool:
    """Whether a value is a ``Secret`` block or one of pydantic's secret types."""
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return isinstance(held, _SECRET_TYPES)


def plain(value: Any) -> Any:
    """Return what a secret holds, and any other value as it is.

    A ``Secret`` block's own ``get()`` would read the text ``"1e5"`` as a number.
    """
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return held.get_secret_value() if isinstance(held, _SECRET_TYPES) else value


def with_plain_secrets(value: Any) -> Any:
    """Return a copy of nested mappings and lists with what each secret holds in its place."""
    if isinstance(value, Mapping):
        return {key: with_plain_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_plain_secrets(item) for item in value]
    return plain(value)
