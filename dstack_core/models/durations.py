"""How long something may take, as dstack writes it."""

from __future__ import annotations

import math
import re
from typing import Any

_DURATION = re.compile(r"\d+ *[smhdw]?")
_WHOLE = re.compile(r"-?\d+")


def check_duration(value: int | str | bool | None, *, off: bool = False) -> int | str | bool | None:
    """Return ``value`` when it is a duration: seconds above 0, or a text such as ``"2h"``.

    With ``off`` also ``"off"`` and False are, for no limit. Raises ``ValueError``. Source: PROTOCOL 3.2.
    """
    if value is None or (off and (value == "off" or value is False)):
        return value
    if isinstance(value, str):
        fine = _DURATION.fullmatch(value) is not None
    else:
        fine = not isinstance(value, bool) and value > 0
    if not fine:
        ways = '"2h" or "off"' if off else '"2h" or "3d"'
        raise ValueError(f"expected seconds above 0, or a string such as {ways}, got {value!r}")
    return value


def read_duration(value: Any, *, below_zero: bool = False) -> Any:
    """Return a duration as a configuration may have it: also 0, a fraction, ``"off"``, False and True.

    True means the server's default. With ``below_zero`` every negative number means no limit, the older way
    to write it. Raises ``ValueError``. Source: dstack 0.22.5's own client.
    """
    if value is None or isinstance(value, bool) or value == "off":
        return value
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    number = int(value) if isinstance(value, str) and _WHOLE.fullmatch(value) else value
    if isinstance(number, int):
        fine = number >= 0 or below_zero
    else:
        fine = isinstance(value, str) and _DURATION.fullmatch(value) is not None
    if not fine:
        raise ValueError(f'expected seconds, or a string such as "2h" or "off", got {value!r}')
    return value
