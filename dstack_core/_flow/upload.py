"""Bring a packed directory to the server (PROTOCOL 1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import Api


def upload_code(api: Api, repo_id: str, repo_data: Mapping[str, Any], sha256: str, data: bytes) -> Op[None]:
    """Make the repo known and upload its code; both may be repeated. Raises the server errors."""
    yield from call(api.init_repo(repo_id, repo_data))
    yield from call(api.upload_code(repo_id, sha256, data))
