"""The log of a run without what it reports: a person reads lines, not messages for a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dstack_core._wire.reports import MARK, OpenParts, give_up, take
from dstack_core.models.records import LogBytes
from dstack_core.models.reports import DEFAULT_MAX_BYTES


def without_messages(chunks: Iterable[LogBytes]) -> Iterator[bytes]:
    """Yield chunks of a log, byte for byte, without the messages in them; a broken message stays.

    A line without an end is passed on at once unless a message may begin in it, so a progress bar is seen
    while it moves.
    """
    kept: dict[str, tuple[bytes, OpenParts]] = {}
    for chunk in chunks:
        rest, parts = kept.get(chunk.submission_id, (b"", {}))
        whole = rest + chunk
        end = whole.rfind(b"\n") + 1
        block, rest = whole[:end], whole[end:]
        if MARK in block:
            block, _, parts = take(block, parts, DEFAULT_MAX_BYTES)
        if not _may_begin_a_message(rest):
            block, rest = block + rest, b""
        kept[chunk.submission_id] = (rest, parts)
        if block:
            yield block
    for rest, parts in kept.values():
        if MARK in rest:
            # The last line may lack its end.
            rest, _, parts = take(rest + b"\n", parts, DEFAULT_MAX_BYTES)
        broken, _ = give_up(parts)
        if rest or broken:
            yield rest + broken


def _may_begin_a_message(text: bytes) -> bool:
    return MARK in text or any(text.endswith(MARK[:length]) for length in range(1, len(MARK)))
