"""The faults of a request: the rows of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

# Seconds that the port stays closed: after a refused connection, and during a restart. With the shorter pauses of
# `matrix.shorter_waits`, several retries meet the closed port. docs/reliability.md names the second number.
REFUSED_SECONDS = 0.08
RESTART_SECONDS = 0.4
_LOGIN = "https://login.example/sign-in?next=dstack"


@dataclass(frozen=True)
class Fault:
    """One fault of a request; ``carried_out``: whether the server carries the request out."""

    name: str
    carried_out: bool
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


FAULTS = (
    Fault("refuse the connection", False),
    Fault("cut before the request", False),
    Fault("cut after the request (lost reply)", True),
    Fault("cut in the middle of the reply", True),
    Fault("429 with Retry-After", False, 429, (("retry-after", "1"),), b'{"detail": "slow down"}'),
    Fault("500 plain text", False, 500, (("content-type", "text/plain"),), b"Internal Server Error"),
    Fault("502 HTML", False, 502, (("content-type", "text/html"),), b"<html><h1>502 Bad Gateway</h1></html>"),
    Fault("503", False, 503, (), b"no healthy upstream"),
    Fault("empty body", True, 200, (), b""),
    Fault("half a JSON", True),
    Fault("JSON of the wrong shape", True, 200, (), b'{"unexpected": [1, 2, 3]}'),
    Fault("redirect to a login page", False, 302, (("location", _LOGIN),), b""),
    Fault("stall past the timeout", True),
    Fault("one byte a second", True),
    Fault("server restarted in between", True),
)

# A lost machine: the process that sent the request is ended by SIGKILL.
KILLS = (
    Fault("kill -9 before the request is carried out", False),
    Fault("kill -9 after the request was carried out", True),
)
