"""A hostile container, jump host or sshproxy cannot make a caller wait without limit or fill the memory."""

from __future__ import annotations

import base64
import hashlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing

import paramiko
import pytest

from dstack_core._attach import hops as hops_module
from dstack_core._attach import live_logs
from dstack_core._attach.hops import Chain
from dstack_core._attach.host_keys import HostKeys
from dstack_core._attach.live_logs import LogStream
from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError
from tests.core.ssh_hosts import RUN_KEY, USER, Host, way
from tests.faults.raw_server import Answer, Reaction, reacting, repeating, talking

PATIENCE = 30.0
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops_module, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(live_logs, "_OPEN_SECONDS", 0.5)
    monkeypatch.setattr(live_logs, "_SILENCE_SECONDS", 0.5)


def memory() -> int:
    """Return the peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


DAEMONS: dict[str, Callable[[], Answer]] = {
    "says nothing": lambda: repeating(b"", b"", 10.0),
    "a banner line without end": lambda: repeating(b"", b"x" * 1024, 0.01),
    "banner lines without end": lambda: repeating(b"", b"hello\r\n", 0.01),
    "a banner byte by byte": lambda: repeating(b"SSH-2.0-", b"x", 0.05),
    "no key exchange": lambda: repeating(b"SSH-2.0-x\r\n", b"", 10.0),
    "a packet that announces 4 GiB": lambda: repeating(b"SSH-2.0-x\r\n\xff\xff\xff\xff\x04", b"\x00" * 65536),
    "garbage": lambda: repeating(b"SSH-2.0-x\r\n", bytes(range(256)) * 256),
}


@pytest.mark.parametrize("what", DAEMONS)
def test_gives_up_on_a_daemon_that_never_logs_in(what: str) -> None:
    before = memory()
    with talking(DAEMONS[what]()) as port, closing(Chain()) as chain:
        began = time.monotonic()
        with pytest.raises(AttachError, match=f"jump host {USER}@127.0.0.1:{port}"):
            chain.open([Hop("jump host", "127.0.0.1", port, USER)], RUN_KEY.private, HostKeys())
        assert time.monotonic() - began < PATIENCE
    assert memory() - before < 100_000_000


def test_gives_up_on_a_login_without_an_answer() -> None:
    over = threading.Event()

    class Mute(list[str]):
        def append(self, _: str) -> None:
            over.wait(PATIENCE)

    with closing(Host()) as host, closing(Chain()) as chain:
        host.logins = Mute()
        began = time.monotonic()
        with pytest.raises(AttachError, match=f"container {USER}@"):
            chain.open(way([host]), RUN_KEY.private, HostKeys())
        assert time.monotonic() - began < PATIENCE
        over.set()


def test_gives_up_on_a_channel_that_never_opens() -> None:
    over = threading.Event()
    with closing(Host()) as host, closing(Chain()) as chain:

        def never(name: str, port: int) -> None:
            over.wait(PATIENCE)

        host.connect = never  # type: ignore[method-assign]
        chain.open(way([host]), RUN_KEY.private, HostKeys())
        began = time.monotonic()
        with pytest.raises(AttachError, match="did not answer within"):
            chain.channel(80, timeout=0.5)
        assert time.monotonic() - began < PATIENCE
        over.set()


def test_a_host_cannot_connect_into_this_machine() -> None:
    with closing(Host()) as host, closing(Chain()) as chain:
        chain.open(way([host]), RUN_KEY.private, HostKeys())
        (theirs,) = host.client_connections()
        with pytest.raises((paramiko.ChannelException, paramiko.SSHException)):
            theirs.open_forwarded_tcpip_channel(("127.0.0.1", 1), ("127.0.0.1", 22))
        with pytest.raises((paramiko.ChannelException, paramiko.SSHException)):
            theirs.open_x11_channel(("127.0.0.1", 6000))


def upgraded(then: Answer) -> Reaction:
    """Return an answer that accepts the websocket handshake, then continues with ``then``."""

    def react(connection: socket.socket, head: bytes) -> None:
        key = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:"))
        accepted = base64.b64encode(hashlib.sha1(key.partition(b":")[2].strip() + GUID).digest())  # noqa: S324 - RFC 6455 wants it
        connection.sendall(
            b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accepted + b"\r\n\r\n"
        )
        then(connection)

    return react


def frame(opcode: int, size: int, *, final: bool = True) -> bytes:
    """Return the head of a frame that announces ``size`` bytes."""
    return struct.pack("!BBQ", (0x80 if final else 0) | opcode, 127, size)


def connection_to(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


def read_on(stream: LogStream) -> None:
    while stream.read() is not None:
        continue


MESSAGES: dict[str, Callable[[], Answer]] = {
    "a frame of petabytes": lambda: repeating(frame(2, 1 << 50), b"x" * 65536),
    "a text frame of petabytes": lambda: repeating(frame(1, 1 << 62), b"x" * 65536),
    "a message of endless frames": lambda: repeating(
        frame(2, 0, final=False), frame(0, 65536, final=False) + b"x" * 65536
    ),
    "no websocket": lambda: repeating(b"", b"x" * 65536),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_live_log_that_announces_too_much_is_cut(what: str) -> None:
    before = memory()
    with reacting(upgraded(MESSAGES[what]())) as url:
        stream = LogStream(connection_to(url))
        with closing(stream), pytest.raises(AttachError, match="the live log was interrupted"):
            read_on(stream)
    assert memory() - before < 100_000_000


def test_a_live_log_of_empty_messages_counts_as_silence() -> None:
    with reacting(upgraded(repeating(b"", frame(2, 0), 0.001))) as url:
        stream = LogStream(connection_to(url))
        with closing(stream):
            began = time.monotonic()
            assert stream.read() == b""
            assert 0.4 < time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 101 Go\r\nX-Long: "])
def test_gives_up_on_a_live_log_without_a_handshake(first: bytes) -> None:
    def drip(connection: socket.socket, head: bytes) -> None:
        del head
        repeating(first, b"x", 0.05)(connection)

    with reacting(drip) as url:
        began = time.monotonic()
        with pytest.raises(AttachError, match="did not start the live log"):
            LogStream(connection_to(url))
        assert time.monotonic() - began < PATIENCE
