"""What both transports need to know of a server."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from dstack_core.errors import ProtocolError, TransientServerError


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Hold the server's address, the token (never in a repr) and the time limits in seconds.

    ``timeout`` bounds each wait for bytes of a reply, four times that the whole reply, ``connect_timeout``
    the connect. ``verify`` is True, False, or the path of a CA bundle.
    """

    server_url: str
    token: str = field(repr=False)
    timeout: float = 30.0
    connect_timeout: float = 5.0
    verify: bool | str = True

    @property
    def whole_timeout(self) -> float:
        """Return how long a whole reply may take: one byte at a time must not hold a caller for ever."""
        return 4 * self.timeout

    def within(self, seconds: float | None) -> Limits:
        """Return the limits for one request whose caller has ``seconds`` left, None for these settings'."""
        if seconds is None:
            return Limits(self.connect_timeout, self.timeout, self.whole_timeout)
        return Limits(
            min(self.connect_timeout, seconds), min(self.timeout, seconds), min(self.whole_timeout, seconds)
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """The time limits of one request in seconds: to connect, between two parts of a reply, for all of it."""

    connect: float
    read: float
    whole: float

    @property
    def too_slow(self) -> str:
        """The fault of a reply that takes longer than ``whole``."""
        return f"no complete reply within {_in_words(self.whole)}"

    @property
    def too_silent(self) -> str:
        """The fault of a reply of which nothing arrives for ``read`` seconds."""
        return f"no reply within {_in_words(self.read)}"

    @property
    def first_wait(self) -> float:
        """How long the head of a reply may take where one timer bounds that and the connect."""
        return min(self.connect + self.read, self.whole)

    @property
    def no_head(self) -> str:
        """The fault of a reply of which nothing has arrived after ``first_wait``."""
        return f"no reply within {_in_words(self.first_wait)}"

    @property
    def no_connection(self) -> str:
        """The fault of a server that takes no connection within ``connect``."""
        return f"no connection within {_in_words(self.connect)}"


LARGEST_REPLY = 256 * 1024 * 1024
TOO_BIG = f"the reply is longer than {LARGEST_REPLY} bytes, which no dstack server sends"


def _in_words(seconds: float) -> str:
    """Return a limit without the digits that come of subtracting times: 2.2 s, not 2.234447540000474 s."""
    return f"{round(max(seconds, 0.1), 1):g} s"


def no_answer(error: Exception) -> str:
    """Say in words that no reply came; of a library's nested errors the innermost reason."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    text = " ".join(str(cause).split()).rpartition("): ")[2] or type(error).__name__
    return f"no answer: {text[:200]}"


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
