"""What can go wrong at a request: the rows of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

REFUSED_SECONDS = 0.08
RESTART_SECONDS = 0.4
_LOGIN = "https://login.example/sign-in?next=dstack"


@dataclass(frozen=True)
class Fault:
    """Name what goes wrong; the request is carried out where ``carried_out`` says so."""

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

# What a machine does that is lost; the process that asked is ended by SIGKILL.
KILLS = (
    Fault("kill -9 before the request is carried out", False),
    Fault("kill -9 after the request was carried out", True),
)
