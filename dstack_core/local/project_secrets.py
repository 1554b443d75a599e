"""The secrets of the project: their values are returned by secrets/get alone, and reach jobs as variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from dstack_core.local.errors import bad_request, not_exists
from dstack_core.local.references import fill_in

_NAME = "^[A-Za-z0-9-_]{1,200}$"
_LONGEST = 5000  # characters, a limit of the server


@dataclass
class Secret:
    """A secret; its value is not shown."""

    name: str
    value: str = field(repr=False)
    id: str = field(default_factory=lambda: str(uuid4()))

    def wire(self, with_value: bool) -> dict[str, Any]:
        """Return the secret as JSON data."""
        return {"id": self.id, "name": self.name, "value": self.value if with_value else None}


class ProjectSecrets:
    """The secrets of the one project."""

    def __init__(self) -> None:
        self._secrets: dict[str, Secret] = {}

    def all(self) -> list[dict[str, Any]]:
        """Return the secrets without their values, newest first."""
        return [secret.wire(False) for secret in reversed(self._secrets.values())]

    def get(self, name: str) -> dict[str, Any]:
        """Return a secret with its value; raises ApiError 400 if it is missing."""
        if name not in self._secrets:
            raise not_exists("Resource not found")
        return self._secrets[name].wire(True)

    def set(self, name: str, value: str) -> dict[str, Any]:
        """Create or update a secret; raises ApiError 400 for a name or value that the server refuses."""
        # As on the real server: a line break at the end of a name passes, and its message lacks a quote.
        if re.match(_NAME, name) is None:
            raise bad_request(f"Secret name should match regex '{_NAME}")
        if len(value) > _LONGEST:
            raise bad_request(f"Secret value length must not exceed {_LONGEST}")
        secret = self._secrets.setdefault(name, Secret(name, value))
        secret.value = value
        return secret.wire(True)

    def delete(self, names: list[str]) -> None:
        """Delete secrets; raises ApiError 400, and deletes none, if one is missing."""
        if missing := [name for name in dict.fromkeys(names) if name not in self._secrets]:
            raise not_exists(f"Secrets not found: {', '.join(missing)}")
        for name in names:
            self._secrets.pop(name, None)

    def fill_in(self, spec: Mapping[str, Any]) -> dict[str, str]:
        """Return the variables of a job with their values; raises UnfilledReference if a secret is missing.

        The credentials of its registry are checked, too. No image is pulled here, so they are not used.
        """
        values = {f"secrets.{secret.name}": secret.value for secret in self._secrets.values()}
        filled = {name: fill_in(text, values) for name, text in spec["env"].items()}
        for text in (spec["registry_auth"] or {}).values():
            fill_in(text, values)
        return filled
