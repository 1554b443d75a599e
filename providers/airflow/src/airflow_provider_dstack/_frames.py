"""Find in a run's log what a function of ``@task.dstack`` returned, and keep it out of the task's log.

A frame is written by ``_remote.py`` as one or more lines ``@@dstack:<key>:<part>/<parts>:<base64>@@``. The
key, drawn from the run's marker, keeps apart what the function itself may print.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

_FRAME = re.compile(r"@@dstack:([0-9a-f]{16}):(\d+)/(\d+):([A-Za-z0-9+/=]*)@@")
_START = "@@dstack:"


def frame_key(marker: str) -> str:
    """Return the key of the frames of the run that carries ``marker``: 16 hex digits."""
    return sha256(f"frame {marker}".encode()).hexdigest()[:16]


def without_frames(line: str) -> str | None:
    """Return what a log line holds beside a frame, None when there is nothing else."""
    if _START not in line:
        return line
    rest = _FRAME.sub("", line)
    return rest if rest.strip() or rest == line else None


def read_frame(chunks: Iterable[bytes], key: str) -> dict[str, Any] | None:
    """Return the content of the last whole frame with ``key`` in a log, None when there is none.

    Keeps no more of the log in memory than one line and the frame. Raises ``ValueError`` for a frame that
    came broken.
    """
    parts: list[str] = []
    found: list[str] | None = None
    for line in _lines(chunks):
        for match in _FRAME.finditer(line):
            its_key, part, total, data = match.groups()
            if its_key != key:
                continue
            if part == "1":
                parts = []
            parts.append(data)
            if part == total:
                found = parts if len(parts) == int(total) else []
    return None if found is None else _decoded(found)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _decoded(parts: list[str]) -> dict[str, Any]:
    try:
        data = base64.b64decode("".join(parts), validate=True)
        digest, _, text = data.partition(b"\n")
        if sha256(text).hexdigest().encode() != digest:
            raise ValueError("its checksum is wrong")
        content = json.loads(text)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the result in the run's log is broken: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("the result in the run's log is broken: it is no object")
    return content
