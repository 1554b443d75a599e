"""Names for what a request leaves unnamed."""

from __future__ import annotations

import secrets
from collections.abc import Container

_ADJECTIVES = ("brave", "calm", "clever", "eager", "gentle", "happy", "kind", "lively", "proud", "quick")
_ANIMALS = ("badger", "crane", "falcon", "gecko", "heron", "lynx", "otter", "panda", "robin", "stoat")


def unused_name(taken: Container[str]) -> str:
    """Return a random name that is not taken."""
    while True:
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_ANIMALS)}-{secrets.randbelow(1000)}"
        if name not in taken:
            return name
