"""Hide in logs what a run was given as a secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
