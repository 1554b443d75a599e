"""Report results, live numbers and files from inside a dstack run. Python 3.8+, standard library only.

    import dstack_report
    dstack_report.metric(step=10, loss=0.31)
    dstack_report.result({"accuracy": 0.97})

A report is a JSON object with a "kind", in ASCII, on stdout; the reader of the log takes it out of the log.
* Up to 3000 bytes: ``::dstack::`` and the object, until the end of the line.
* Longer: parts, one a line, ``::dstack:<id>:<n>/<total>:<cksum>:<piece>``. ``id`` is random, ``n`` counts
  from 1, ``cksum`` is what POSIX's command prints for the whole object, and the joined pieces are the object.
A line is shorter than 4096 bytes and written by one call: a pipe or terminal takes it at once, so the output
of other processes can't land inside it. On a non-blocking stdout it can; the reader drops what that breaks.

Outside a run (``DSTACK_RUN_NAME`` isn't set) only names and texts are checked, and nothing is written. Wrong
arguments raise TypeError or ValueError. A report that can't be written because stdout is closed or its reader
has gone is dropped: it must not fail a training. JSON has no NaN and no infinity: metrics, tables and
metadata carry them as the strings "nan", "inf" and "-inf"; `result` rejects them.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import select
import sys
import threading
import zlib
from contextlib import suppress
from typing import Any, Dict, Iterable, NoReturn, Optional, SupportsFloat

_Number = Optional[SupportsFloat]

# The longest piece of a line. Pipes and terminals take 4096 bytes at once, and the prefix needs some of them.
_PIECE = 3000
_MAX_IMAGE = 256 * 1024
# What is kept of a message; a larger one would be dropped by the reader.
_MAX_BYTES = 1024 * 1024
_MAX_DEPTH = 100
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

# Reentrant, because a signal handler may report while its thread is reporting.
_lock = threading.RLock()
# Another thread may hold the lock during a fork; it doesn't exist in the child to release it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))


class Skipped(SystemExit):
    """The end of a run that has nothing to do: a script that doesn't catch it ends with status 0."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason, self.code = reason, 0


def is_active() -> bool:
    """Return whether this process is part of a dstack run."""
    return bool(os.environ.get("DSTACK_RUN_NAME"))


def metric(step: _Number = None, **values: SupportsFloat) -> None:
    """Report numbers, such as ``metric(step=10, loss=0.31)``; scalars of NumPy or PyTorch are numbers too."""
    for name in values.keys() & {"kind", "v"}:
        raise _wrong(ValueError, "metric", "names other than kind, v and step", name, "Rename it.")
    if not values:
        raise TypeError("dstack_report.metric: expected at least one number such as loss=0.3, got none.")
    if is_active():
        given: Dict[str, Any] = values if step is None else {"step": step, **values}
        _send("metric", {name: _number("metric", name, value) for name, value in given.items()})


def progress(
    value: _Number = None, text: str | None = None, *, done: _Number = None, total: _Number = None
) -> None:
    """Report how much of the work is done.

    Args:
        value: The share of the work, from 0 to 1. Either this or ``done`` and ``total``.
        text: What is being done, such as ``"epoch 3"``.
        done: How many units are done. More than ``total`` counts as ``total``.
        total: How many units there are.
    """
    _check_text("progress", text=text)
    if (done is None) != (total is None) or (value is None) == (done is None):
        expected, got = "a value from 0 to 1, or done and total", f"{value=}, {done=}, {total=}"
        raise TypeError(f"dstack_report.progress: expected {expected}, got {got}.")
    if is_active() and done is None:
        share = _number("progress", "value", value)
        # Sums of floats end a little beside 0 and 1.
        if not -1e-6 <= share <= 1 + 1e-6:
            raise _wrong(ValueError, "progress", "a value from 0 to 1", value, "Counts are done and total.")
        _send("progress", {"value": min(max(share, 0), 1), "text": text})
    elif is_active():
        count, whole = _number("progress", "done", done), _number("progress", "total", total)
        if not (0 <= count < math.inf and 0 < whole < math.inf):
            raise _wrong(ValueError, "progress", "done from 0 and total above 0", (done, total))
        _send("progress", {"done": min(count, whole), "total": whole, "text": text})


def result(value: Any) -> None:
    """Report the result of the run, which is any JSON data. The last one counts."""
    if is_active():
        _send("result", {"value": value})


def table(name: str, rows: Iterable[Any], columns: Iterable[str] | None = None) -> None:
    """Report a table.

    Args:
        name: Its title. A later table of the same name replaces it.
        rows: A dict or a list for each row. A dict without one of the columns has None there.
        columns: The names of the columns. Default: the keys of the dicts; rows that are lists need it.
    """
    _check_text("table", name=name)
    if not is_active():
        return
    lines = list(rows)
    if columns is None and not all(isinstance(row, dict) for row in lines):
        raise TypeError("dstack_report.table: expected columns for rows that are lists, got none.")
    # A dict keeps its keys in the order of their first appearance.
    heads = list({key: None for row in lines for key in row} if columns is None else columns)
    for head in heads:
        _check_text("table", columns=head)
    cells = [[row.get(head) for head in heads] if isinstance(row, dict) else row for row in lines]
    for number, row in enumerate(cells):
        if not isinstance(row, (list, tuple)) or len(row) != len(heads):
            raise _wrong(ValueError, "table", f"a dict or {len(heads)} values at rows[{number}]", row)
    _send("table", {"name": name, "columns": heads, "rows": cells})


def link(url: str, text: str | None = None) -> None:
    """Report the address of a page, such as a dashboard, and optionally the text to show for it."""
    _check_text("link", url=url, text=text)
    if not url.lower().startswith(("http://", "https://")):
        raise _wrong(ValueError, "link", "an http:// or https:// address", url, "For data, use asset().")
    if is_active():
        _send("link", {"url": url, "text": text})


def image(name: str, png: Any, text: str | None = None) -> None:
    """Report an image.

    Args:
        name: Its title. A later image of the same name replaces it.
        png: A PNG of at most 256 KB: bytes, the path of a file, or a figure with ``savefig`` (Matplotlib).
        text: A caption.
    """
    _check_text("image", name=name, text=text)
    if not is_active():
        return
    if hasattr(png, "savefig"):
        buffer = io.BytesIO()
        png.savefig(buffer, format="png")
        png = buffer.getvalue()
    elif isinstance(png, (str, os.PathLike)):
        with open(png, "rb") as file:
            png = file.read(_MAX_IMAGE + 1)
    if not isinstance(png, (bytes, bytearray)):
        raise _wrong(TypeError, "image", "bytes, a path or a figure for png", png)
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise _wrong(ValueError, "image", "a PNG", bytes(png[:8]), "Convert the image.")
    if len(png) > _MAX_IMAGE:
        raise ValueError(f"dstack_report.image: expected at most 256 KB for {name!r}, got more. Shrink it.")
    _send("image", {"name": name, "png": base64.b64encode(png).decode("ascii"), "text": text})


def asset(uri: str, **metadata: Any) -> None:
    """Report data that the run has written, such as ``asset("s3://bucket/table", rows=1000)``."""
    _check_text("asset", uri=uri)
    if is_active():
        _send("asset", {"uri": uri, "metadata": metadata or None})


def checkpoint(path: str | os.PathLike[str], step: _Number = None, **metadata: Any) -> None:
    """Report a checkpoint: where it is stored, the step it belongs to, and what else describes it."""
    place = os.fspath(path) if isinstance(path, os.PathLike) else path
    _check_text("checkpoint", path=place)
    if is_active():
        at = None if step is None else _number("checkpoint", "step", step)
        _send("checkpoint", {"path": place, "step": at, "metadata": metadata or None})


def skip(reason: str) -> NoReturn:
    """End a run that has nothing to do, by raising `Skipped`. In other threads than the main one it can't."""
    _check_text("skip", reason=reason)
    if is_active():
        _send("skip", {"reason": reason})
    raise Skipped(reason)


def _wrong(kind: type[Exception], where: str, expected: str, got: object, advice: str = "") -> Exception:
    shown = repr(got) if len(repr(got)) <= 80 else repr(got)[:77] + "..."
    return kind(f"dstack_report.{where}: expected {expected}, got {shown}. {advice}".rstrip())


def _check_text(where: str, **texts: object) -> None:
    for name, value in texts.items():
        if not (isinstance(value, str) and value) and not (name == "text" and value in (None, "")):
            raise _wrong(TypeError, where, f"a non-empty string for {name}", value)


def _number(where: str, name: str, value: Any) -> float:
    number = value
    with suppress(Exception):
        if not isinstance(value, (int, float)):
            number = value.item() if hasattr(value, "item") else value.__float__()
    if not isinstance(number, (int, float)) or (name == "step" and not -math.inf < number < math.inf):
        raise _wrong(TypeError, where, f"a number for {name}", value)
    return int(number) if isinstance(number, bool) else number


def _plain(kind: str, place: str, value: Any, depth: int = 0) -> Any:
    """Return ``value`` as JSON data, or raise an error that names the place of what JSON doesn't have."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if kind == "result" and not math.isfinite(value):
            raise _wrong(ValueError, kind, f"a finite number at {place}", value, "JSON has only those.")
        return value if math.isfinite(value) else str(float(value))
    if depth == _MAX_DEPTH:
        raise ValueError(f"dstack_report.{kind}: expected at most {_MAX_DEPTH} nested levels, got more.")
    if isinstance(value, (list, tuple)):
        return [_plain(kind, f"{place}[{index}]", item, depth + 1) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        raise _wrong(TypeError, kind, f"JSON data at {place}", value, "Use numbers, strings, lists, dicts.")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(TypeError, kind, f"strings as keys of {place}", key, "Use str(key).")
    return {key: _plain(kind, f"{place}[{key!r}]", item, depth + 1) for key, item in value.items()}


def _cksum(data: bytes) -> int:
    """Return what the POSIX command ``cksum`` prints: the CRC of zlib, with the bits in opposite order."""
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "little")
    return int(f"{zlib.crc32((data + length).translate(_MIRRORED), 0xFFFFFFFF):032b}"[::-1], 2)


def _send(kind: str, payload: Dict[str, Any]) -> None:
    given = {name: value for name, value in payload.items() if value is not None or kind == "result"}
    plain = {name: _plain(kind, name, value) for name, value in given.items()}
    message = json.dumps({"kind": kind, **plain}, separators=(",", ":")).encode("ascii")
    if len(message) > _MAX_BYTES:
        raise ValueError(
            f"dstack_report.{kind}: expected at most 1 MiB as JSON, got {len(message)} bytes. Write what is "
            "large to a volume or a bucket, and report where it is."
        )
    lines = [b"::dstack::%s\n" % message]
    if len(message) > _PIECE:
        # Not from `random`, whose seed belongs to the training.
        name, total, crc = os.urandom(8).hex().encode(), -(-len(message) // _PIECE), _cksum(message)
        heads = [b"::dstack:%s:%d/%d:%d:" % (name, number + 1, total, crc) for number in range(total)]
        lines = [head + message[n * _PIECE : (n + 1) * _PIECE] + b"\n" for n, head in enumerate(heads)]
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError), _lock:
        # If Python started without stdout, descriptor 1 may be any file that was opened since.
        for line in lines if sys.__stdout__ is not None else ():
            while line:
                try:
                    line = line[os.write(1, line) :]
                except BlockingIOError:
                    select.select([], [1], [])
