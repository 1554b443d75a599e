"""SSH logins hop by hop, each through the one before (PROTOCOL 4.4).

The problem: a container is reached through up to three machines, and a user of this package may have neither
an ``ssh`` program nor a configuration for it. paramiko offers the parts, but not their use in a chain, nor
errors from which a user sees which machine failed.

The idea: the first hop is a TCP connection, every other one a ``direct-tcpip`` channel of the hop before, on
which the next SSH transport runs. Every exception is turned into an ``AttachError`` that names the hop.

What makes it fast, measured once and held by tests/core/test_attach_speed.py: ``TCP_NODELAY``, because
Nagle's delay cost 40 ms at each step of a login; AES-GCM, with which a byte costs a third less; and reading
ahead (``read_ahead``), since each byte passes through one transport a hop.

Invariant: nothing waits without a limit. Connecting, the start of SSH, each login and opening a channel have
time limits, and a connection whose other side vanished ends by itself.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dstack_core._attach.host_keys import HostKeys
from dstack_core._attach.own_keys import own_keys
from dstack_core._attach.read_ahead import reading_ahead
from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

_LOG_CHANNEL = "dstack_core.paramiko"
# The limit of each step: connecting, starting SSH, a login, opening the channel to the next hop. Chosen, not
# measured. Less gives up on slow machines; more delays the error for an address that does not answer, and
# ``Persistence.attempts`` multiplies that.
_CONNECT_SECONDS = 10.0
# Chosen: more often than firewalls drop idle connections, which takes minutes. It also lets the kernel notice
# a machine that vanished, because only data that was sent can stay without an acknowledgement.
_KEEPALIVE_SECONDS = 10
# Three keepalives without an acknowledgement. By default Linux retries for about 15 minutes, in which the
# live log and the forwarded ports hang; less than this would cut connections over a line with short breaks.
_SILENCE_MILLISECONDS = 30_000


class LostError(AttachError):
    """The loss of the connection itself, not only of the channel that was requested."""


class Chain:
    """The connections of all hops, each inside the one before; closing it twice is fine."""

    def __init__(self) -> None:
        self._transports: list[paramiko.Transport] = []
        self._closed = False

    def open(self, hops: Sequence[Hop], key: paramiko.PKey, host_keys: HostKeys) -> None:
        """Log in at every hop. Raises ``AttachError`` that names the hop, what failed and what to do."""
        for hop in hops:
            # Checked before each hop, because ``close`` may be called from another thread meanwhile.
            if self._closed:
                raise AttachError("given up")
            self._transports.append(self._connect(hop))
            _log_in(self._transports[-1], hop, key, host_keys)

    @property
    def is_open(self) -> bool:
        """Whether the last connection is up."""
        return bool(self._transports) and self._transports[-1].is_active()

    def wait_until_cut(self) -> None:
        """Wait until the last connection ends."""
        self._transports[-1].join()

    def channel(self, port: int, timeout: float) -> paramiko.Channel:
        """Return a channel to a port of the last hop; ``timeout`` in seconds.

        Raises ``LostError`` if the connection is gone, else ``AttachError``.
        """
        # The name is resolved in the container: a service that listens on 127.0.0.1 or ::1 is found.
        return _open_channel(self._transports[-1], "localhost", port, timeout)

    def session(self, timeout: float) -> paramiko.Channel:
        """Return a channel for a shell or command in the last hop; ``timeout`` in seconds.

        Raises ``AttachError``.
        """
        import paramiko

        try:
            return self._transports[-1].open_session(timeout=timeout)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise AttachError(f"the container opened no session: {error_text(error)}") from None

    def close(self) -> None:
        """Cut the connections, the innermost first."""
        self._closed = True
        for transport in reversed(self._transports):
            # It sends a farewell, and the connection may be gone already.
            with contextlib.suppress(OSError, EOFError):
                transport.close()

    def _connect(self, hop: Hop) -> paramiko.Transport:
        import paramiko

        try:
            if self._transports:
                through = _open_channel(self._transports[-1], hop.hostname, hop.port, _CONNECT_SECONDS)
                transport = paramiko.Transport(reading_ahead(through))
            else:
                transport = paramiko.Transport(reading_ahead(_connect_socket(hop)))
        except (OSError, EOFError, paramiko.SSHException, AttachError) as error:
            raise AttachError(
                f"{hop}: no connection: {error_text(error)}. Check that the machine is up and that its SSH "
                "port can be reached from here."
            ) from None
        # paramiko runs a thread for each transport, which must not keep the process alive.
        transport.daemon = True
        transport.set_log_channel(_quiet_channel())
        return transport


def _connect_socket(hop: Hop) -> socket.socket:
    connection = socket.create_connection((hop.hostname, hop.port), timeout=_CONNECT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        # A machine that vanished sends nothing, so unacknowledged data is the only sign of it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MILLISECONDS)
    return connection


def _open_channel(through: paramiko.Transport, hostname: str, port: int, timeout: float) -> paramiko.Channel:
    import paramiko

    began = time.monotonic()
    try:
        return through.open_channel("direct-tcpip", (hostname, port), ("127.0.0.1", 0), timeout=timeout)
    except paramiko.ChannelException as error:
        raise AttachError(f"{hostname}:{port} rejected the connection ({error.text})") from None
    except (OSError, EOFError, paramiko.SSHException) as error:
        # paramiko raises the same exception for both, so the clock decides.
        if time.monotonic() - began >= timeout:
            raise AttachError(f"{hostname}:{port} did not answer within {timeout:.0f} s") from None
        raise LostError(f"the connection to {hostname}:{port} was lost: {error_text(error)}") from None


def _log_in(transport: paramiko.Transport, hop: Hop, key: paramiko.PKey, host_keys: HostKeys) -> None:
    import paramiko

    options = transport.get_security_options()
    # AES-GCM encrypts and signs in one call, so a byte costs a third less (measured on OpenSSH, with rekeys).
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    # Otherwise a host with several keys may show one that known_hosts does not have.
    wanted = _algorithms(host_keys.expected_types(hop), options.key_types)
    if wanted:
        options.key_types = wanted
    try:
        transport.start_client(timeout=_CONNECT_SECONDS)
        if not transport.initial_kex_done:
            # ``start_client`` also returns when its time limit has passed, as if SSH had started.
            raise TimeoutError(f"no SSH reply within {_CONNECT_SECONDS:g} s")
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise AttachError(
            f"{hop}: connected, but SSH did not start: {error_text(error)}. Its SSH daemon may not be up "
            "yet, or another program listens on that port."
        ) from None
    host_keys.check(hop, transport.get_remote_server_key())
    if hop.own_identity:
        with own_keys(hop.hostname) as own:
            _authenticate(transport, hop, [*own, key])
    else:
        _authenticate(transport, hop, [key])
    transport.set_keepalive(_KEEPALIVE_SECONDS)


def _authenticate(transport: paramiko.Transport, hop: Hop, keys: Sequence[paramiko.PKey]) -> None:
    import paramiko

    transport.auth_timeout = _CONNECT_SECONDS
    problem: Exception | None = None
    for key in keys:
        try:
            transport.auth_publickey(hop.username, key)
        except paramiko.AuthenticationException as error:
            problem = error
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise AttachError(
                f"{hop}: the connection was lost during the login: {error_text(error)}"
            ) from None
        if transport.is_authenticated():
            return
        # A daemon hangs up after too many keys (MaxAuthTries); the others can no longer be tried.
        if not transport.is_active():
            break
    where = (
        "Load the key of this machine into your SSH agent, or name it as IdentityFile in ~/.ssh/config."
        if hop.own_identity
        else "Check that the run was submitted with this key."
    )
    reason = error_text(problem) if problem else "it requires more than a key"
    tried = ", ".join(f"{key.get_name()} {key.fingerprint}" for key in keys)
    raise AttachError(f"{hop}: the login was rejected for {tried} ({reason}). {where}")


def _algorithms(expected: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """Return the offered algorithms, those of the known key types first; empty if none of them is offered.

    ``known_hosts`` names an RSA key ``ssh-rsa``, whichever hash the connection signs with.
    """
    names = {
        name
        for kind in expected
        for name in ([kind, "rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind])
    }
    first = [name for name in offered if name in names]
    return tuple(first + [name for name in offered if name not in names]) if first else ()


def _quiet_channel() -> str:
    """Return the name of a log channel that stays quiet unless the user sets its level.

    paramiko logs a traceback for each connection that is lost, which is an ordinary event here.
    """
    logger = logging.getLogger(_LOG_CHANNEL)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    return _LOG_CHANNEL


def error_text(error: BaseException) -> str:
    """Return the message of an error on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
