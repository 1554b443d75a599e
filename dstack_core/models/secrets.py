"""Which values of a run's environment are to be hidden in logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Shorter than any credential, and common enough to make other lines unreadable.
_SHORTEST = 5


def secret_values(values: Iterable[str | None]) -> Iterator[str]:
    """Yield those of ``values`` (``run.env.values()``, a registry password) that a log must not show.

    Nobody can tell a secret from a setting, so all are, but for numbers, ``true`` and ``false``, and texts of
    less than 5 characters. Raises nothing. A server returns what a run was given in clear text.
    Source: PROTOCOL 1.5.
    """
    for value in values:
        if value and len(value) >= _SHORTEST and not _is_plain(value):
            yield value


def _is_plain(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.lower() in {"true", "false"}
    return True
