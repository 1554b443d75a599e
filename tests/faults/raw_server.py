"""A server of bytes: its replies are written by hand and need not be HTTP."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

Answer = Callable[[socket.socket], None]
Reaction = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def talking(answer: Answer) -> Iterator[int]:
    """Let ``answer`` write to each new connection; yield the port."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            open_ones.append(connection)
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection)

    open_ones: list[socket.socket] = []
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def reacting(react: Reaction) -> Iterator[str]:
    """Let ``react`` write to each connection once the head of a request has arrived; yield the URL."""

    def answer(connection: socket.socket) -> None:
        got = b""
        while b"\r\n\r\n" not in got:
            part = connection.recv(65536)
            if not part:
                return
            got += part
        react(connection, got)

    with talking(answer) as port:
        yield f"http://127.0.0.1:{port}"


def answering(answer: Answer) -> contextlib.AbstractContextManager[str]:
    """Return the same server for an answer that does not use the head."""
    return reacting(lambda connection, _: answer(connection))


def whole(body: bytes, *headers: str) -> Answer:
    """Return an answer with status 200 and this body."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + body)


def repeating(first: bytes, then: bytes, pause: float = 0.0) -> Answer:
    """Return an endless answer: ``first``, then ``then`` repeatedly with ``pause`` seconds in between."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while not over.wait(pause):
            connection.sendall(then)

    return answer
