"""The values of a run's environment that logs must not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Characters. Shorter texts are shorter than any credential, and common enough to make other lines unreadable.
_SHORTEST = 5


def secret_values(values: Iterable[str | None]) -> Iterator[str]:
    """Yield those of ``values`` (``run.env.values()``, a registry password) that a log must not show.

    A program cannot distinguish a secret from a setting, so all values count as secrets, except numbers,
    ``true``, ``false``, and texts of less than 5 characters. A server returns the values of a run in clear
    text. Raises nothing. Source: PROTOCOL 1.5.
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
