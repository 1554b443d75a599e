"""A server of bytes: what it answers is written by hand, so it may be no HTTP at all."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

Answer = Callable[[socket.socket], None]
Reaction = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def talking(answer: Answer) -> Iterator[int]:
    """Have ``answer`` write to each connection at once; give the port."""

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
    """Have ``react`` write to each connection once a request's head has come; give the address."""

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
    """Do the same with what needs no head."""
    return reacting(lambda connection, _: answer(connection))


def whole(body: bytes, *headers: str) -> Answer:
    """Return an answer of status 200 with this body."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + body)


def repeating(first: bytes, then: bytes, pause: float = 0.0) -> Answer:
    """Return an answer without end, ``then`` again and again, ``pause`` seconds between two."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while not over.wait(pause):
            connection.sendall(then)

    return answer
