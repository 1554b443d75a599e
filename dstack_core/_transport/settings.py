"""What both transports share: a server's settings, the time limits of a request, and reading a body safely.

The problem: a server, or what answers in its place, may send a byte a second, a head that never ends,
gigabytes, or kilobytes that inflate to gigabytes. The time limits of HTTP libraries are for each wait, not
for a whole reply, and they inflate a part as a whole.

The idea: each request has three limits (``Limits``), of which the last bounds the whole reply, and the
transports pass the raw bytes to one ``Body``, which inflates them with a limit.

Invariants: a request ends within its limits, whatever arrives. A reply takes at most ``LARGEST_REPLY`` bytes,
before and after inflating. No error contains the token or holds on to a library's frames, in which the token
is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from dstack_core.errors import ProtocolError, TransientServerError

# Seconds after which a connection without a request is not used again. Uvicorn, in which dstack's server
# runs, closes it after 5 s (its default for ``timeout_keep_alive``), and a request that is sent at that
# moment gets no answer. Measured with three runs of 70 s and polls every 5 s: 9 requests were lost and
# repeated, none with this limit.
IDLE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """The server's address, the token (never in a repr) and the time limits in seconds.

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
        """Return how long a whole reply may take: one byte at a time must not hold a caller forever."""
        # Four waits' worth: a large page over a slow line still arrives, and a dripping one ends in minutes.
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


# More than any dstack server sends, and little enough to hold in memory. 0.18.44 ignores the limit of a log
# page and sends the whole log at once (PROTOCOL 1.8), so a low number would refuse long logs there.
LARGEST_REPLY = 256 * 1024 * 1024
TOO_BIG = f"the reply is longer than {LARGEST_REPLY} bytes, which no dstack server sends"


def _in_words(seconds: float) -> str:
    """Return a limit without the digits that come of subtracting times: 2.2 s, not 2.234447540000474 s."""
    return f"{round(max(seconds, 0.1), 1):g} s"


def no_answer(error: Exception) -> str:
    """Return a message that no reply came, with the innermost reason of a library's nested errors."""
    # The outer ones repeat the address, and the pool's repr, several times.
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    text = " ".join(str(cause).split()).rpartition("): ")[2] or type(error).__name__
    return f"no answer: {text[:200]}"


ACCEPTED = "gzip"
_INFLATED = frozenset({"gzip", "x-gzip", "deflate"})
# zlib finds out by itself whether a stream is gzip's or its own.
_ANY_HEADER = 32 + zlib.MAX_WBITS


class Body:
    """The body of a reply, gathered from its parts as they come, and inflated.

    The libraries inflate a whole part at once: a few kilobytes of a malicious server would fill the memory.
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
        """Add the next part. Raises ``TransientServerError`` for broken compression, too."""
        self._got += len(part)
        if self._inflates:
            self._inflate(part)
        else:
            self._body += part
        if max(self._got, len(self._body)) > LARGEST_REPLY:
            raise ProtocolError(TOO_BIG)

    def whole(self) -> bytes:
        """Return the body. Raises ``TransientServerError`` when its end is missing."""
        # A connection that breaks may look like the end of the body; the end of the compressed stream is
        # sure.
        if self._inflates and self._got and not self._stream.eof:
            raise TransientServerError(no_answer(EOFError("the compressed reply is incomplete")))
        return bytes(self._body)

    def _inflate(self, part: bytes) -> None:
        while part:
            # A compressed body may consist of several streams, one after the other.
            if self._stream.eof:
                self._stream = zlib.decompressobj(_ANY_HEADER)
            # One byte more than allowed is enough to notice.
            try:
                self._body += self._stream.decompress(part, LARGEST_REPLY + 1 - len(self._body))
            except zlib.error as error:
                raise TransientServerError(no_answer(error)) from None
            if self._stream.unconsumed_tail:
                raise ProtocolError(TOO_BIG)
            part = self._stream.unused_data
