"""Multipart uploads of code and file archives (PROTOCOL 1.3)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

from starlette.datastructures import UploadFile
from starlette.requests import Request

from dstack_core.local.errors import bad_request, invalid
from dstack_core.local.state import State

# The default of a real server's DSTACK_SERVER_CODE_UPLOAD_LIMIT (PROTOCOL 1.3).
LIMIT = 2 * 1024 * 1024


async def _receive(state: State, request: Request, what: str) -> tuple[str, Path]:
    async with request.form() as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise invalid([{"loc": ("file",), "msg": "Field required", "type": "missing"}])
        if not upload.filename:
            raise bad_request(f"{what} name is not specified")
        content = await upload.read()
        digest = upload.filename
    if len(content) > LIMIT:
        size, limit = len(content) / 1024**2, LIMIT / 1024**2
        raise bad_request(f"{what} size is {size:.2f}MB, which exceeds the {limit:.2f}MB limit")
    # Use a name of our own on disk, because the client's name is not checked.
    path = state.uploads / str(uuid4())
    await asyncio.to_thread(path.write_bytes, content)
    return digest, path


async def receive_code(state: State, request: Request) -> None:
    """Store the code of a repo under its hash, which is the file name; raises ApiError 400 or 422."""
    repo_id = request.query_params.get("repo_id")
    if repo_id is None:
        raise invalid([{"loc": ("repo_id",), "msg": "Field required", "type": "missing"}])
    if repo_id not in state.repos and repo_id != "none":
        raise bad_request(f"Repo {repo_id} does not exist", "repo_does_not_exist")
    digest, path = await _receive(state, request, "Repo diff")
    state.codes[repo_id, digest] = path


async def receive_archive(state: State, request: Request) -> dict[str, Any]:
    """Store a file archive and return its id; the same hash is stored once."""
    digest, path = await _receive(state, request, "Archive")
    for archive_id, (known, _) in state.archives.items():
        if known == digest:
            await asyncio.to_thread(path.unlink)
            return {"id": archive_id, "hash": digest}
    archive_id = str(uuid4())
    state.archives[archive_id] = (digest, path)
    return {"id": archive_id, "hash": digest}
