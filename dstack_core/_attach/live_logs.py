"""Read a job's output live from its runner (PROTOCOL 4.6)."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Protocol

from dstack_core._attach.hops import told
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

_URL = "ws://localhost/logs_ws"
_OPEN_SECONDS = 15.0
_SILENCE_SECONDS = 15.0
_PIECE = 256 * 1024
# A runner sends what it read of the terminal in one piece, 32 KiB at most; petabytes may be announced.
LARGEST_FRAME = 4 * 1024 * 1024
_LOG_CHANNEL = "dstack_core.websockets"


class Connection(Protocol):
    """Be a channel or a socket to the runner."""

    def settimeout(self, timeout: float, /) -> None:
        """Let ``recv`` raise ``TimeoutError`` after that many seconds."""

    def recv(self, size: int, /) -> bytes:
        """Return what has come, none at the end."""

    def sendall(self, data: bytes, /) -> None:
        """Send everything."""

    def close(self) -> None:
        """Hang up; also ends a ``recv`` in another thread."""


class LogStream:
    """Give what the job wrote, from its first byte on; raw terminal bytes.

    The websocket is spoken over the connection itself: a local port and threads between would cost half of
    the speed.
    """

    def __init__(self, connection: Connection) -> None:
        """Ask the runner for the log. Raises ``AttachError``."""
        self._connection = connection
        self._websocket = _websocket()
        self._ended = False
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def read(self) -> bytes | None:
        """Return the next bytes, none after 15 silent seconds, None behind the end.

        What came at once is given at once. Raises ``AttachError`` when the connection was cut.
        """
        deadline = time.monotonic() + _SILENCE_SECONDS
        while True:
            data = self._take()
            if data:
                return data
            if self._ended:
                self._check_end()
                return None
            try:
                self._receive(deadline)
            except TimeoutError:
                return b""
            except (OSError, EOFError) as error:
                raise AttachError(f"the live log was interrupted: {told(error)}") from None

    def close(self) -> None:
        """Leave; also ends a ``read`` in another thread."""
        # It says goodbye, and the way may be gone already.
        with contextlib.suppress(OSError, EOFError):
            self._connection.close()

    def _ask(self) -> None:
        from websockets.protocol import State

        deadline = time.monotonic() + _OPEN_SECONDS
        websocket = self._websocket
        problem: Exception | None = None
        try:
            websocket.send_request(websocket.connect())
            self._send()
            while websocket.state is State.CONNECTING and not self._ended:
                self._receive(deadline)
            problem = websocket.handshake_exc
        except TimeoutError:
            problem = TimeoutError(f"no answer within {_OPEN_SECONDS:.0f} s")
        except (OSError, EOFError) as error:
            problem = error
        if problem is not None:
            raise AttachError(f"the runner did not start the live log: {told(problem)}")

    def _take(self) -> bytes:
        """Return the bytes of all frames that are whole."""
        from websockets.frames import DATA_OPCODES, Frame

        events = self._websocket.events_received()
        return b"".join(
            event.data for event in events if isinstance(event, Frame) and event.opcode in DATA_OPCODES
        )

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        data = self._connection.recv(_PIECE)
        if data:
            self._websocket.receive_data(data)
        else:
            self._websocket.receive_eof()
        self._ended = not data or self._websocket.close_expected()
        self._send()

    def _send(self) -> None:
        """Send what the websocket wants to say, such as the answer to a ping."""
        for data in self._websocket.data_to_send():
            if data:
                self._connection.sendall(data)

    def _check_end(self) -> None:
        """Raise ``AttachError`` unless the runner said that this is all."""
        from websockets.frames import OK_CLOSE_CODES

        told = self._websocket.close_rcvd
        if told is None or told.code not in OK_CLOSE_CODES:
            raise AttachError(
                f"the live log was interrupted: {self._websocket.parser_exc or told or 'the runner hung up'}"
            )


def _websocket() -> ClientProtocol:
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri

    return ClientProtocol(parse_uri(_URL), max_size=LARGEST_FRAME, logger=_quiet_logger())


def _quiet_logger() -> logging.Logger:
    logger = logging.getLogger(_LOG_CHANNEL)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    return logger
