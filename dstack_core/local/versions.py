"""The check of the X-API-VERSION header (PROTOCOL 1.1)."""

from __future__ import annotations

import re

from dstack_core.local.errors import bad_request
from dstack_core.local.state import SERVER_VERSION


def check_client_version(header: str | None) -> None:
    """Raise ApiError 400 for a malformed version, or one newer than the server's (patch numbers aside)."""
    if header is None or header == "latest":
        return
    match = re.match(r"(\d+)\.(\d+)(?:\.|$)", header)
    if match is None:
        raise bad_request(f"Invalid version: {header}")
    major, minor = (int(part) for part in SERVER_VERSION.split(".")[:2])
    if (int(match[1]), int(match[2])) > (major, minor):
        raise bad_request(
            f"The client/CLI version ({header}) is incompatible with the server version ({SERVER_VERSION})."
        )
