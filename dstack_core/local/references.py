"""References such as ``${{ secrets.token }}`` in a job's variables, filled in as by the real server.

A text is read from left to right, up to the first reference that is not closed. Two rules of the real server
surprise: ``$$`` becomes ``$``, but only as long as no other dollar sign stands alone before it; and a dollar
sign that begins no reference ends the search for ``$$``, not the one for references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_OPENING, _CLOSING = "${{", "}}"
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\.[a-zA-Z_][a-zA-Z0-9_]*")


class UnfilledReference(Exception):
    """A reference that is malformed, or whose value is missing; the message holds no value."""


def fill_in(text: str, values: Mapping[str, str]) -> str:
    """Return a text with its references replaced; raises UnfilledReference if one has no value."""
    out: list[str] = []
    missing: list[str] = []
    at = 0
    while at < len(text):
        dollar = text.find("$", at)
        if dollar in (-1, len(text) - 1):
            out.append(text[at:])
            break
        if text[dollar + 1] == "$":
            out.append(text[at : dollar + 1])
            at = dollar + 2
            continue
        start = text.find(_OPENING, at)
        if start < 0:
            out.append(text[at:])
            break
        end = text.find(_CLOSING, start)
        if end < 0:
            raise UnfilledReference(f"No pattern closing: {text[start:]}")
        out.append(text[at:start])
        name = text[start + len(_OPENING) : end].strip()
        if _NAME.fullmatch(name) is None:
            raise UnfilledReference(f"Illegal reference name: {name}")
        if name in values:
            out.append(values[name])
        else:
            missing.append(name)
        at = end + len(_CLOSING)
    if missing:
        raise UnfilledReference(f"Failed to interpolate due to missing vars: {missing}")
    return "".join(out)
