"""Put the body of a reply together, within limits of size."""

from __future__ import annotations

import zlib

from dstack_core._transport.settings import LARGEST_REPLY, TOO_BIG, no_answer
from dstack_core.errors import ProtocolError, TransientServerError

ACCEPTED = "gzip"
_INFLATED = frozenset({"gzip", "x-gzip", "deflate"})
# zlib finds out by itself whether a stream is gzip's or its own.
_ANY_HEADER = 32 + zlib.MAX_WBITS


class Body:
    """Gather the parts of a body as they come and inflate them.

    The libraries inflate a whole part at once: of a malicious server a few kilobytes would fill the memory.
    Raises ``ProtocolError`` for a body past the limit, or encoded in a way that was not asked for.
    """

    def __init__(self, encoding: str | None) -> None:
        encoding = (encoding or "identity").strip().lower()
        if encoding != "identity" and encoding not in _INFLATED:
            raise ProtocolError(f"the reply: expected no encoding, gzip or deflate, got {encoding[:40]!r}")
        self._inflates = encoding in _INFLATED
        self._stream = zlib.decompressobj(_ANY_HEADER)
        self._got = 0
        self._body = bytearray()

    def add(self, part: bytes) -> None:
        """Take what came next. Raises ``TransientServerError`` for broken compression too."""
        self._got += len(part)
        if self._inflates:
            self._inflate(part)
        else:
            self._body += part
        if max(self._got, len(self._body)) > LARGEST_REPLY:
            raise ProtocolError(TOO_BIG)

    def whole(self) -> bytes:
        """Return the body. Raises ``TransientServerError`` when its end is missing."""
        if self._inflates and self._got and not self._stream.eof:
            raise TransientServerError(no_answer(EOFError("the compressed reply is incomplete")))
        return bytes(self._body)

    def _inflate(self, part: bytes) -> None:
        while part:
            if self._stream.eof:
                self._stream = zlib.decompressobj(_ANY_HEADER)
            try:
                self._body += self._stream.decompress(part, LARGEST_REPLY + 1 - len(self._body))
            except zlib.error as error:
                raise TransientServerError(no_answer(error)) from None
            if self._stream.unconsumed_tail:
                raise ProtocolError(TOO_BIG)
            part = self._stream.unused_data
