"""Take the messages that a run reports out of its log (``docs/report-protocol.md``).

The problem: a log is all that a run returns without a volume or a bucket. Several processes write to it at
once, progress bars leave lines open, carriage returns rewrite them, and a line of more than 4096 bytes may be
interrupted by another writer.

The idea: a message is a mark and JSON, found anywhere in a line; a large one comes in parts, each short
enough to be written at once, as it is or in base64, with a checksum of the whole. ``take`` returns the log
without the messages, so that everything behind it (line splitting, relays) knows nothing of them.

Invariants: text that is not part of a whole message stays in the log, bytes unchanged. A message that is
broken is shown as text and counted. Parts that wait for the next ones are plain data on the log's cursor, so
another process can complete them; they are bounded in number and size.

Measured: a log without a mark costs one search of its bytes.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dstack_core.models.reports import payload_of

MARK = b"::dstack:"
VERSION = 1
# More unfinished messages than processes of one job that report at once; the oldest is given up first.
_MOST_OPEN = 32
_MOST_SHOWN = 2000
_ENVELOPE_BYTES = 128

_SHORT = re.compile(rb"::dstack::[ \t]*(?=\{)")
_PART = re.compile(rb"::dstack:([A-Za-z0-9]{1,32}):(\d{1,6})/(\d{1,6}):(\d{1,10}):(.*)", re.DOTALL)

DropReason: TypeAlias = Literal["broken", "too large", "too many"]
OpenParts: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The parts of unfinished messages by id: ``total``, ``sum``, ``next`` (int), ``size``, ``pieces``."""


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message."""

    kind: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message that cannot be used."""

    reason: DropReason


Found: TypeAlias = Message | Dropped


Accepts: TypeAlias = Callable[[str, Mapping[str, Any]], bool]
"""Whether a message of a kind with a payload is one; else it is text."""


def take(
    block: bytes, parts: OpenParts, max_bytes: int, accepts: Accepts = lambda kind, payload: True
) -> tuple[bytes, list[Found], OpenParts]:
    """Return whole lines without the messages in them, the messages, and the parts of unfinished ones.

    Args:
        block: Whole lines, the last one with or without its end.
        parts: The parts that earlier blocks left.
        max_bytes: Most bytes of a message.
        accepts: Which messages are taken.
    """
    taking = _Taking(parts, max_bytes, accepts)
    lines = [shown for line in block.split(b"\n") if (shown := taking.line(line)) is not None]
    return b"\n".join(lines), taking.found, taking.parts


def give_up(parts: OpenParts) -> tuple[bytes, list[Found]]:
    """Return what a log shows of messages that its end left unfinished, as lines."""
    lines = [_shown(opened["pieces"]) + b"\n" for opened in parts.values()]
    return b"".join(lines), [Dropped("broken") for _ in lines]


class _Taking:
    """The work of ``take`` on one block."""

    def __init__(self, parts: OpenParts, max_bytes: int, accepts: Accepts) -> None:
        self._accepts = accepts
        self.found: list[Found] = []
        self.parts: dict[str, Mapping[str, Any]] = dict(parts)
        # The limit is that of the content; the object around a result has some more.
        self._max_bytes = max_bytes + _ENVELOPE_BYTES
        # Parts may be in base64.
        self._max_parts = self._max_bytes * 4 // 3 + 4

    def line(self, line: bytes) -> bytes | None:
        """Return what is left of a line, None if it held nothing but messages."""
        if MARK not in line:
            return line
        body = line.rstrip(b"\r")
        end = line[len(body) :]
        count = len(self.found)
        opened = self.parts
        self.parts = dict(opened)
        # What a carriage return overwrites is not shown, but a message in it was sent.
        states = [self._state(state) for state in body.split(b"\r")]
        took = len(self.found) > count or self.parts != opened
        states = [state for state in states if state or not took]
        return b"\r".join(states) + end if states or not took else None

    def _state(self, text: bytes) -> bytes:
        shown = b""
        while (start := text.find(MARK)) >= 0:
            shown += text[:start]
            text = text[start:]
            if short := _SHORT.match(text):
                rest = self._short(text[short.end() :])
                if rest is None:
                    return shown + text
                text = rest
            elif part := _PART.fullmatch(text):
                return shown + self._part(*part.groups())
            else:
                shown += text[: len(MARK)]
                text = text[len(MARK) :]
        return shown + text

    def _short(self, text: bytes) -> bytes | None:
        """Take a message at the beginning of ``text`` and return what follows; None if it is only text."""
        try:
            decoded = text.decode()
            value, end = _DECODER.raw_decode(decoded)
            message = _message(value)
        except (ValueError, RecursionError):
            self.found.append(Dropped("broken"))
            return None
        if not self._accepts(message.kind, message.payload):
            return None
        rest = decoded[end:].encode()
        if len(text) - len(rest) > self._max_bytes:
            self.found.append(Dropped("too large"))
        else:
            self.found.append(message)
        return rest

    def _part(self, key: bytes, number: bytes, total: bytes, checksum: bytes, piece: bytes) -> bytes:
        """Keep a part and return what is shown instead: nothing, or the text of a message that is broken."""
        name, count = key.decode(), int(total)
        opened, shown = self.parts.pop(name, None), b""
        if int(number) == 1:
            if opened is not None:
                shown = self._broken(opened["pieces"])
            opened = {"total": count, "sum": int(checksum), "next": 1, "size": 0, "pieces": []}
        came = {"total": count, "sum": int(checksum), "next": int(number)}
        text = piece.decode("latin-1")
        if opened is None or came != {name: opened[name] for name in came}:
            return shown + self._broken([*(opened["pieces"] if opened else ()), text])
        size = opened["size"] + len(piece)
        # Of a message that is too large, only its size is kept, to know its end.
        is_large = size > self._max_parts
        pieces = [] if is_large else [*opened["pieces"], text]
        if int(number) < count:
            self.parts[name] = {**came, "next": int(number) + 1, "size": size, "pieces": pieces}
            if len(self.parts) > _MOST_OPEN:
                shown += self._broken(self.parts.pop(next(iter(self.parts)))["pieces"])
            return shown
        if is_large:
            self.found.append(Dropped("too large"))
            return shown
        return shown + self._whole(pieces, int(checksum))

    def _whole(self, pieces: list[str], checksum: int) -> bytes:
        data = "".join(pieces).encode("latin-1")
        try:
            if posix_checksum(data) != checksum:
                raise ValueError("checksum: expected that of the message, got another one.")
            if not data.startswith(b"{"):
                data = base64.b64decode(data, validate=True)
            if len(data) > self._max_bytes:
                self.found.append(Dropped("too large"))
                return b""
            message = _message(json.loads(data.decode(), parse_constant=_NotFinite))
        except (ValueError, RecursionError):
            return self._broken(pieces)
        if not self._accepts(message.kind, message.payload):
            return _shown(pieces)
        self.found.append(message)
        return b""

    def _broken(self, pieces: list[str]) -> bytes:
        self.found.append(Dropped("broken"))
        return _shown(pieces)


class _NotFinite(str):
    """NaN or an infinity, which Python writes although JSON has none."""


_DECODER = json.JSONDecoder(parse_constant=_NotFinite)
_NAMES = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("message: expected an object with a kind, got something else.")
    fields = dict(value)
    kind, version = fields.pop("kind"), fields.pop("v", VERSION)
    if version != VERSION:
        raise ValueError(f"v: expected {VERSION}, got {version!r}.")
    if kind == "metric":
        fields = {name: _finite(field) for name, field in fields.items()}
    elif any(_not_finite(fields)):
        raise ValueError("value: expected JSON, got a number that it lacks.")
    return Message(kind, payload_of(kind, fields))


def _finite(value: Any) -> Any:
    if isinstance(value, _NotFinite):
        return _NAMES[value]
    # JSON may write a number that is too large for a float.
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _not_finite(value: Any) -> Iterator[bool]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _not_finite(item)
    elif isinstance(value, _NotFinite) or value in (float("inf"), float("-inf")):
        yield True


def _shown(pieces: list[str]) -> bytes:
    data = "".join(pieces).encode("latin-1")
    cut = data if len(data) <= _MOST_SHOWN else data[:_MOST_SHOWN] + b" [...]"
    return MARK + cut


# The POSIX ``cksum`` reads each byte from its highest bit on, zlib from its lowest; so the bits of each byte,
# and of the sum, are reversed around a call of zlib, which is a thousand times as fast as a loop.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def posix_checksum(data: bytes) -> int:
    """Return what the POSIX command ``cksum`` prints for ``data``."""
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "little")
    crc = zlib.crc32((data + length).translate(_REVERSED), 0xFFFFFFFF)
    return int(f"{crc:032b}"[::-1], 2)
