"""The live log as a websocket through a real SSH login: what counts as output, what as the end, and what as neither."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from dstack_core._attach import live_logs
from dstack_core._attach.live_logs import LogStream
from dstack_core._attach.tunnel import Tunnel
from dstack_core.errors import AttachError
from tests.core.ssh_hosts import AT_ONCE, RUN_KEY, Echo, Host, runner, way
from tests.ports import free_port

FRAMES = [b"one\r\n", b"\x1b[1mtwo", b"\x1b[0m\r\n"]


@contextmanager
def stream(port: int) -> Iterator[LogStream]:
    """Open the log of the runner on a port, through an SSH login."""
    with closing(Host()) as host, closing(Tunnel(way([host]), AT_ONCE)) as tunnel:
        tunnel.open(RUN_KEY.private)
        with closing(LogStream(tunnel.channel(port, 30))) as stream:
            yield stream


def send_all(connection: ServerConnection) -> None:
    assert connection.request is not None
    assert connection.request.path == "/logs_ws"
    for frame in FRAMES:
        connection.send(frame)


def read_all(stream: LogStream) -> bytes:
    """Read until the runner closes the stream; frames that arrive together are returned together."""
    return b"".join(iter(stream.read, None))


def test_a_stream_ends_where_the_runner_closes_it() -> None:
    with runner(send_all) as port, stream(port) as log:
        assert read_all(log) == b"".join(FRAMES)
        assert log.read() is None


def test_a_frame_is_returned_as_soon_as_it_arrives() -> None:
    release = threading.Event()

    def wait(connection: ServerConnection) -> None:
        connection.send(b"one\r\n")
        assert release.wait(30)
        connection.send("zwölf\r\n")

    with runner(wait) as port, stream(port) as log:
        assert log.read() == b"one\r\n"
        release.set()
        assert read_all(log) == "zwölf\r\n".encode()


def test_frames_larger_than_a_read_and_in_fragments_are_whole() -> None:
    big = bytes(range(256)) * 8192

    def send(connection: ServerConnection) -> None:
        connection.send(big)
        connection.send([big, b"", big])
        connection.ping()
        connection.send(b"end")

    with runner(send) as port, stream(port) as log:
        assert read_all(log) == big * 3 + b"end"


def test_a_ping_is_answered_and_does_not_count_as_output() -> None:
    def ask(connection: ServerConnection) -> None:
        assert connection.ping().wait(30)
        connection.send(b"answered")

    with runner(ask) as port, stream(port) as log:
        assert read_all(log) == b"answered"


def test_silence_is_reported_even_while_pings_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_logs, "_SILENCE_SECONDS", 0.2)
    release = threading.Event()

    def ping(connection: ServerConnection) -> None:
        while not release.wait(0.01):
            connection.ping()

    with runner(ping) as port:
        try:
            with stream(port) as log:
                assert log.read() == b""
        finally:
            release.set()


def test_a_failed_stream_is_an_error_and_not_the_end() -> None:
    def fail(connection: ServerConnection) -> None:
        connection.send(b"one\r\n")
        connection.close(1011, "trouble")

    def drop(connection: ServerConnection) -> None:
        connection.send(b"one\r\n")
        connection.socket.shutdown(socket.SHUT_RDWR)

    for behave in (fail, drop):
        with runner(behave) as port, stream(port) as log:
            assert log.read() == b"one\r\n"
            with pytest.raises(AttachError, match="the live log was interrupted"):
                log.read()


def test_a_frame_that_announces_too_many_bytes_is_not_waited_for() -> None:
    def announce(connection: ServerConnection) -> None:
        connection.send(b"one\r\n")
        connection.socket.sendall(b"\x82\x7f" + (8 << 30).to_bytes(8) + b"x")
        with suppress(ConnectionClosed):
            connection.recv(30)

    with runner(announce) as port, stream(port) as log:
        assert log.read() == b"one\r\n"
        with pytest.raises(AttachError, match=r"the live log was interrupted: .*8589934592"):
            log.read()


def test_a_stream_that_does_not_start_is_an_error() -> None:
    with pytest.raises(AttachError, match="rejected the connection"), stream(free_port()):
        pass
    with (
        closing(Echo()) as echo,
        pytest.raises(AttachError, match="the runner did not start the live log: did not receive a valid"),
        stream(echo.port),
    ):
        pass


def test_waiting_for_a_runner_that_does_not_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_logs, "_OPEN_SECONDS", 0.1)
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
        pytest.raises(AttachError, match="the runner did not start the live log: no answer within"),
        stream(silent.getsockname()[1]),
    ):
        pass


def test_a_read_ends_when_the_stream_is_closed_by_another_thread() -> None:
    release = threading.Event()

    def wait(connection: ServerConnection) -> None:
        connection.send(b"one\r\n")
        release.wait(30)

    with runner(wait) as port, stream(port) as log:
        assert log.read() == b"one\r\n"
        ended: list[Any] = []

        def read() -> None:
            try:
                ended.append(log.read())
            except AttachError as error:
                ended.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        log.close()
        reader.join(10)
        release.set()
        assert len(ended) == 1
