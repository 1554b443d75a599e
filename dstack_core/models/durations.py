"""How long something may take, as dstack writes it."""

from __future__ import annotations

import re

_DURATION = re.compile(r"\d+ *[smhdw]?")


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
        raise ValueError(f"{value!r} is no duration; write seconds above 0, or a text such as {ways}")
    return value
