"""Tags of a cloud's resources, which group its bill: what servers accept, and what every cloud does.

A server accepts more than its clouds do: it sends a cloud only the tags that are valid there, and drops the
others without a word. Google Cloud is the strictest: its keys and values have at most 63 lowercase letters,
digits, underscores and hyphens. Source: dstack 0.22.5 (its tags and its backends); PROTOCOL 2.2.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from dstack_core.errors import ConfigurationError

# The server's own rules; a tag that breaks one makes it refuse the whole run.
_KEY = re.compile(r"[_\-a-zA-Z0-9]{1,60}")
_VALUE = re.compile(r"[a-zA-Z0-9 .:/=_\-+@]{0,256}")
_NOT_EVERYWHERE = re.compile(r"[^a-z0-9_-]+")
# Of a value on Google Cloud.
_LONGEST = 63
# Letters of which no accent can be taken off.
_LETTERS = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "ı": "i"})


def check_tags(name: str, tags: Any) -> dict[str, str]:
    """Return tags that servers accept.

    Args:
        name: The parameter, for the error.
        tags: The tags by key.

    Raises:
        ConfigurationError: It is not a mapping, or a server would refuse a tag; the error names it.
    """
    if not isinstance(tags, Mapping):
        raise ConfigurationError(f'{name}: expected a dict such as {{"team": "ml"}}, got {tags!r}.')
    for key, value in tags.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ConfigurationError(
                f"{name}: expected a key of 1 to 60 letters (a to z), digits, hyphens and underscores, got "
                f"{key!r}. Rename the key; dstack_core.integration.tag_value() makes one of any text."
            )
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ConfigurationError(
                f"{name}: expected a value of at most 256 letters (a to z), digits, spaces and any of "
                f".:/=_-+@ for {key}, got {value!r}. Pass text of these characters; "
                "dstack_core.integration.tag_value() makes it of any text."
            )
    return dict(tags)


def lowercase_ascii(text: str) -> str:
    """Return a text in lowercase, with ASCII letters for those that have an accent; others are kept.

    Names of runs and tags share this, so that both show the same of a flow's or DAG's name.
    """
    plain = unicodedata.normalize("NFKD", text.lower().translate(_LETTERS))
    # The accents, now characters of their own, leave no gap.
    return "".join(character for character in plain if not unicodedata.combining(character))


def tag_value(text: object, *, default: str = "value") -> str:
    """Return a text in the form that is a valid tag value on every cloud.

    Args:
        text: Any value; its text is lowercased, accents are dropped, and everything but ASCII letters,
            digits, underscores and hyphens becomes a hyphen. If letters or digits are lost, or more than 63
            characters are left, a hash replaces the end, so that different values stay different.
        default: What comes before the hash if nothing else is left of the text.

    Example:
        ``tag_value("scheduled__2026-11-23T12:00")`` returns ``"scheduled__2026-11-23t12-00"``.
    """
    from hashlib import sha256

    plain = lowercase_ascii(str(text))
    kept = _NOT_EVERYWHERE.sub("-", plain).strip("-")
    is_lossy = any(character.isalnum() and not character.isascii() for character in plain)
    if len(kept) <= _LONGEST and not is_lossy:
        return kept
    start = (kept or default)[: _LONGEST - 7].rstrip("-")
    return f"{start}-{sha256(str(text).encode()).hexdigest()[:6]}"
