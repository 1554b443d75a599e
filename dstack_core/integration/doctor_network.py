"""The findings of a connection: name, port, TLS, certificate; and what a finding is.

A failed request does not show at which step it failed, nor a way out. So the steps are tried
one by one, without the libraries of the client.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from dstack_core.errors import ProtocolError, ServerError, ServerUnreachableError, TransientServerError
from dstack_core.integration.command_line import PLAIN, TextStyle

State = Literal["ok", "warning", "error", "skipped"]
_CONNECT_SECONDS = 5.0
# Days before the end of a certificate: enough to renew it by hand.
_CERTIFICATE_DAYS = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of one check.

    Attributes:
        check: What was checked, such as ``"token"``.
        state: ``"ok"``, ``"warning"`` (it works, but not as it should), ``"error"``, or ``"skipped"``.
        text: What was found, one sentence.
        advice: What to do, one or two sentences; empty for ``"ok"`` and ``"skipped"``.
    """

    check: str
    state: State
    text: str
    advice: str = ""


def describe_finding(found: Finding, style: TextStyle = PLAIN) -> str:
    """Return a finding as one line of text, with a second one for the advice.

    ``style`` (``TextStyle``) colors its state; by default it has none. Lines are not cut, so that commands in
    them can be copied.
    """
    advice = f"\n{'':<8} -> {found.advice}" if found.advice else ""
    return f"{style.state(f'{found.state:<8}')} {found.check}: {found.text}{advice}"


def error(check: str, text: str, advice: str) -> Finding:
    """Return the finding of something that does not work."""
    return Finding(check, "error", text, advice)


def warning(check: str, text: str, advice: str) -> Finding:
    """Return the finding of something that works, but not as it should."""
    return Finding(check, "warning", text, advice)


def unreachable(url: str, problem: ServerError) -> Finding:
    if isinstance(problem, ProtocolError):
        return error(
            "server",
            f"{url} answers, but not as a dstack server: {problem.message}",
            "Check the address and the port (a dstack server's is 3000), and proxies in between.",
        )
    if not isinstance(problem, TransientServerError | ServerUnreachableError):
        return error("server", problem.message, "Check the address.")
    return _probe(url) or error(
        "server", problem.message, "Check that the server is up, and read its own log."
    )


def _probe(url: str) -> Finding | None:
    """Find out at which step a connection fails; None if the connection itself works."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as problem:
        return error(
            "server",
            f"The name {host} has no address here ({problem.strerror}).",
            "Check its spelling, this machine's DNS, and the VPN if the server is behind one.",
        )
    try:
        connection = socket.create_connection((host, port), _CONNECT_SECONDS)
    except TimeoutError:
        return error(
            "server",
            f"{host}:{port} did not answer within {_CONNECT_SECONDS:g} s.",
            "A firewall or security group may drop the packets: allow this machine to reach the port.",
        )
    except OSError as problem:
        return error(
            "server",
            f"{host}:{port} refused the connection ({problem.strerror}).",
            "Start the server (dstack server), or correct the port: its default is 3000.",
        )
    with connection:
        if parts.scheme != "https":
            return None
        try:
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host):
                return None
        except ssl.SSLCertVerificationError as problem:
            return error(
                "TLS",
                f"The certificate of {host} is not trusted here: {problem.verify_message}.",
                "Pass the path of your CA bundle as verify= (Airflow, Prefect: CA bundle), or renew it.",
            )
        except OSError as problem:
            return error(
                "TLS",
                f"{host}:{port} does not speak TLS ({problem}).",
                f"If the server has no certificate, its address is http://{parts.netloc}.",
            )


def certificate(url: str) -> Iterator[Finding]:
    parts = urlsplit(url)
    if parts.scheme != "https":
        if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            yield warning(
                "TLS",
                f"{url} has no TLS: the token and your code travel as plain text.",
                "Put the server behind HTTPS.",
            )
        return
    try:
        address = (parts.hostname or "", parts.port or 443)
        with (
            socket.create_connection(address, _CONNECT_SECONDS) as connection,
            ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname) as tls,
        ):
            ends = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
    except (OSError, KeyError):
        # A certificate that only the client's own CA bundle trusts, or a proxy: the request has worked.
        yield Finding("TLS", "ok", "The server's certificate is accepted.")
        return
    days = (ends - time.time()) / 86400
    if days < _CERTIFICATE_DAYS:
        yield warning("TLS", f"The server's certificate ends in {days:.0f} days.", "Renew it.")
    else:
        yield Finding("TLS", "ok", f"The server's certificate is valid for {days:.0f} days.")
