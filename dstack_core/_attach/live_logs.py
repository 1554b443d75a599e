"""Reading a job's output live from its runner, over a websocket (PROTOCOL 4.6).

The websocket is spoken over the SSH channel itself, with the protocol parts of ``websockets`` that do no I/O:
a local port and threads between them would cost half of the speed. What arrived together is returned
together, so a fast job costs a call for each 256 KiB and not for each frame.

A stream has ended properly only with the runner's own closing frame. Everything else, such as the end of the
connection, is an ``AttachError``: the caller must not take it for the end of the output.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Protocol

from dstack_core._attach.hops import error_text
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

_URL = "ws://localhost/logs_ws"
# Seconds for the runner's reply to the request for the log. Chosen, not measured: a runner answers at once.
_OPEN_SECONDS = 15.0
# Seconds without a byte after which ``read`` returns, so that its caller can check whether the job has ended.
# Less costs requests for each quiet job; more delays noticing a container that vanished.
_SILENCE_SECONDS = 15.0
# Bytes read at once: several SSH packets, as ``read_ahead`` has them at hand.
_PIECE = 256 * 1024
# A runner sends what it read of the terminal as one frame, 32 KiB at most. The limit refuses a frame whose
# head announces petabytes, instead of waiting for all of it.
LARGEST_FRAME = 4 * 1024 * 1024
_LOG_CHANNEL = "dstack_core.websockets"


class Connection(Protocol):
    """A channel or a socket to the runner."""

    def settimeout(self, timeout: float, /) -> None:
        """Let ``recv`` raise ``TimeoutError`` after that many seconds."""

    def recv(self, size: int, /) -> bytes:
        """Return the bytes that have arrived, ``b""`` at the end."""

    def sendall(self, data: bytes, /) -> None:
        """Send all of ``data``."""

    def close(self) -> None:
        """Close it; also ends a ``recv`` in another thread."""


class LogStream:
    """What the job wrote, from its first byte on, as raw terminal bytes."""

    def __init__(self, connection: Connection) -> None:
        """Request the log from the runner. Raises ``AttachError``."""
        self._connection = connection
        self._websocket = _websocket()
        self._ended = False
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def read(self) -> bytes | None:
        """Return the next bytes, ``b""`` if none came for 15 seconds, None at the end.

        Raises ``AttachError`` if the connection broke.
        """
        deadline = time.monotonic() + _SILENCE_SECONDS
        while True:
            # Before the end is checked: frames that came together with it are still to be returned.
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
                raise AttachError(f"the live log was interrupted: {error_text(error)}") from None

    def close(self) -> None:
        """Close the connection; also ends a ``read`` in another thread."""
        # It sends a farewell, and the connection may be gone already.
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
            raise AttachError(f"the runner did not start the live log: {error_text(problem)}")

    def _take(self) -> bytes:
        """Return the bytes of all frames that have arrived completely."""
        from websockets.frames import DATA_OPCODES, Frame

        events = self._websocket.events_received()
        return b"".join(
            event.data for event in events if isinstance(event, Frame) and event.opcode in DATA_OPCODES
        )

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        # A connection would take a limit of 0 as "do not block", and a negative one as a mistake.
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
        """Send what the protocol has to send, such as the reply to a ping."""
        for data in self._websocket.data_to_send():
            if data:
                self._connection.sendall(data)

    def _check_end(self) -> None:
        """Raise ``AttachError`` unless the runner closed the stream with a frame for a proper end."""
        from websockets.frames import OK_CLOSE_CODES

        closed = self._websocket.close_rcvd
        if closed is None or closed.code not in OK_CLOSE_CODES:
            reason = self._websocket.parser_exc or closed or "the runner hung up"
            raise AttachError(f"the live log was interrupted: {reason}")


def _websocket() -> ClientProtocol:
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri

    return ClientProtocol(parse_uri(_URL), max_size=LARGEST_FRAME, logger=_quiet_logger())


def _quiet_logger() -> logging.Logger:
    """Return a logger that stays quiet unless the user sets its level: at DEBUG it logs the job's output."""
    logger = logging.getLogger(_LOG_CHANNEL)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    return logger
