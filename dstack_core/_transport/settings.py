"""What both transports need to know of a server."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Hold the server's address, the token (never in a repr) and the time limits in seconds.

    ``timeout`` bounds each wait for bytes of a reply, ``connect_timeout`` the connect. ``verify`` is
    True, False, or the path of a CA bundle.
    """

    server_url: str
    token: str = field(repr=False)
    timeout: float = 30.0
    connect_timeout: float = 5.0
    verify: bool | str = True


def no_answer(error: Exception) -> str:
    """Say in words that no reply came; of a library's nested errors the innermost reason."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    text = " ".join(str(cause).split()).rpartition("): ")[2] or type(error).__name__
    return f"no answer: {text[:200]}"
