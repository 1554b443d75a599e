"""Replace ``${{ name }}`` in the texts of a configuration by values, as dstack's own client does.

Two namespaces are left to the server: ``secrets`` everywhere, though it fills them in in ``env`` and
``registry_auth`` alone, and the addresses of ``groups`` in commands. In a text with ``${{``, ``$$`` is an
escaped ``$``, so that ``$${{ x }}`` reaches the run as ``${{ x }}``. Like dstack's client this stops reading
``$$`` that way behind a single ``$``; unlike it, ``$${{`` is the escape there, too. A text without ``${{`` is
left alone, so that ``kill $$`` means what it means in a shell (dstack's client sends ``kill $``).

Anything else in ``${{ }}`` is an error: no server fills it in, and the command would fail on a paid machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dstack_core.errors import ConfigurationError

_OPEN, _CLOSE = "${{", "}}"


_NAME = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)


SECRET = re.compile(r"secrets\.[A-Za-z_]\w*", re.ASCII)


ADDRESS = re.compile(r"groups\[\d+\]\.(nodes|replicas)\[\d+\]\.IP_ADDRESS", re.ASCII)


@dataclass(frozen=True, slots=True)
class Interpolator:
    """The values of one kind of text, and the references in it that are the server's.

    The error for a reference that nothing fills in shows ``examples`` and ends with ``advice``.
    ``is_secret``: no error shows the text.
    """

    values: Mapping[str, str] = field(repr=False)
    deferred: tuple[re.Pattern[str], ...]
    examples: str
    advice: str
    is_secret: bool = False

    def fill(self, text: str, where: str) -> str:
        """Return ``text`` with its references filled in; ``where`` is its place in the configuration."""
        # Nearly every text has no reference; what follows reads as dstack's own client does.
        if _OPEN not in text:
            return text
        parts: list[str] = []
        start = 0
        while start < len(text):
            dollar = text.find("$", start)
            if dollar < 0 or dollar == len(text) - 1:
                break
            # "$$" is an escaped dollar sign, so what follows it is not a reference.
            if text[dollar + 1] == "$":
                parts.append(text[start : dollar + 1])
                start = dollar + 2
                continue
            opening = text.find(_OPEN, dollar)
            if opening < 0:
                break
            if opening > dollar and text[opening - 1] == "$":
                parts.append(text[start:opening])
                start = opening + 1
                continue
            closing = text.find(_CLOSE, opening)
            if closing < 0:
                raise self._error(where, text[opening:])
            parts += text[start:opening], self._value(text[opening : closing + len(_CLOSE)], where)
            start = closing + len(_CLOSE)
        return "".join([*parts, text[start:]])

    def _value(self, reference: str, where: str) -> str:
        name = reference[len(_OPEN) : -len(_CLOSE)].strip()
        if any(pattern.fullmatch(name) for pattern in self.deferred):
            return reference
        if name not in self.values:
            raise self._error(where, f"${{{{ {name} }}}}" if _NAME.fullmatch(name) else reference)
        return self.values[name]

    def _error(self, where: str, reference: str) -> ConfigurationError:
        is_name = _NAME.fullmatch(reference.strip("${} ")) is not None
        shown = reference[:60] if is_name or not self.is_secret else "another one"
        return ConfigurationError(
            f"{where}: expected a reference such as {self.examples}, got {shown}. {self.advice}"
        )
