"""Log in hop by hop, each through the one before (PROTOCOL 4.4)."""

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
from dstack_core._attach.read_ahead import gulping
from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

_LOG_CHANNEL = "dstack_core.paramiko"
_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 10
_SILENCE_MILLISECONDS = 30_000


class LostError(AttachError):
    """Say that the connection itself is gone, not only what was wanted of it."""


class Chain:
    """Hold the connections of all hops; each runs inside the one before. Closing it twice is fine."""

    def __init__(self) -> None:
        self._transports: list[paramiko.Transport] = []
        self._closed = False

    def open(self, hops: Sequence[Hop], key: paramiko.PKey, host_keys: HostKeys) -> None:
        """Log in at every hop. Raises ``AttachError`` that names the hop, what failed and what to do."""
        for hop in hops:
            if self._closed:
                raise AttachError("given up")
            self._transports.append(self._connect(hop))
            _log_in(self._transports[-1], hop, key, host_keys)

    @property
    def is_open(self) -> bool:
        """Tell whether the last connection stands."""
        return bool(self._transports) and self._transports[-1].is_active()

    def wait_until_cut(self) -> None:
        """Wait until the last connection ends."""
        self._transports[-1].join()

    def channel(self, port: int, timeout: float) -> paramiko.Channel:
        """Return a channel to a port of the last hop; ``timeout`` in seconds.

        Raises ``LostError`` when the connection is gone, else ``AttachError``.
        """
        return _open_channel(self._transports[-1], "localhost", port, timeout)

    def close(self) -> None:
        """Cut the connections, the innermost first."""
        self._closed = True
        for transport in reversed(self._transports):
            # It says goodbye, and the way may be gone already.
            with contextlib.suppress(OSError, EOFError):
                transport.close()

    def _connect(self, hop: Hop) -> paramiko.Transport:
        import paramiko

        try:
            if self._transports:
                through = _open_channel(self._transports[-1], hop.hostname, hop.port, _CONNECT_SECONDS)
                transport = paramiko.Transport(gulping(through))
            else:
                transport = paramiko.Transport(gulping(_connect_socket(hop)))
        except (OSError, EOFError, paramiko.SSHException, AttachError) as error:
            raise AttachError(
                f"{hop}: no connection: {told(error)}. Check that the machine is up and that its SSH port "
                "can be reached from here."
            ) from None
        transport.daemon = True
        transport.set_log_channel(_quiet_channel())
        return transport


def _connect_socket(hop: Hop) -> socket.socket:
    connection = socket.create_connection((hop.hostname, hop.port), timeout=_CONNECT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        # A machine that vanished says nothing: what was sent must be acknowledged in this time.
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
        if time.monotonic() - began >= timeout:
            raise AttachError(f"{hostname}:{port} did not answer within {timeout:.0f} s") from None
        raise LostError(f"the connection to {hostname}:{port} was lost: {told(error)}") from None


def _log_in(transport: paramiko.Transport, hop: Hop, key: paramiko.PKey, host_keys: HostKeys) -> None:
    import paramiko

    options = transport.get_security_options()
    # It encrypts and signs in one call, which nearly halves what a byte costs here.
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    wanted = _algorithms(host_keys.expected_types(hop), options.key_types)
    if wanted:
        options.key_types = wanted
    try:
        transport.start_client(timeout=_CONNECT_SECONDS)
        if not transport.initial_kex_done:
            # It also returns when its time is over.
            raise TimeoutError(f"no SSH reply within {_CONNECT_SECONDS:g} s")
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise AttachError(
            f"{hop}: connected, but SSH did not start: {told(error)}. Its SSH daemon may not be up yet, or "
            "another program listens on that port."
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
            raise AttachError(f"{hop}: the connection was lost during the login: {told(error)}") from None
        if transport.is_authenticated():
            return
        if not transport.is_active():
            break
    where = (
        "Load the key of this machine into your SSH agent, or name it as IdentityFile in ~/.ssh/config."
        if hop.own_identity
        else "Check that the run was submitted with this key."
    )
    reason = told(problem) if problem else "it requires more than a key"
    tried = ", ".join(f"{key.get_name()} {key.fingerprint}" for key in keys)
    raise AttachError(f"{hop}: the login was rejected for {tried} ({reason}). {where}")


def _algorithms(expected: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """Put the algorithms of the known key types first; an RSA key is known under its old name."""
    names = {
        name
        for kind in expected
        for name in ([kind, "rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind])
    }
    first = [name for name in offered if name in names]
    return tuple(first + [name for name in offered if name not in names]) if first else ()


def _quiet_channel() -> str:
    """Return the name of a log channel that stays silent unless somebody sets its level."""
    logger = logging.getLogger(_LOG_CHANNEL)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    return _LOG_CHANNEL


def told(error: BaseException) -> str:
    """Return what an error says, or its type when it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
