"""What both transports need to know of a server."""

from __future__ import annotations

from dataclasses import dataclass, field


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
