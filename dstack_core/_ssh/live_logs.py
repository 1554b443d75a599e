"""Read a job's output live from its runner (PROTOCOL 4.6)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from dstack_core.errors import AttachError

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_PATH = "/logs_ws"
_OPEN_SECONDS = 15.0
_SILENCE_SECONDS = 15.0
_CLOSE_SECONDS = 1.0
# A runner sends what it read in one piece, 32 KiB at most: a container that announces petabytes is cut off.
_LARGEST_MESSAGE = 4 * 1024 * 1024
_LOG_CHANNEL = "dstack_core.websockets"


class LogStream:
    """Give what the job wrote, from its first byte on; raw terminal bytes."""

    def __init__(self, local_port: int) -> None:
        """Connect to the runner behind ``local_port``. Raises ``AttachError``."""
        self._held = contextlib.ExitStack()
        self._connection = self._held.enter_context(_connection(local_port))

    def read(self) -> bytes | None:
        """Return the next bytes, none after 15 silent seconds, None behind the end.

        Raises ``AttachError`` when the connection was cut.
        """
        from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
        from websockets.protocol import State

        deadline = time.monotonic() + _SILENCE_SECONDS
        try:
            # An empty message says no more than silence does.
            while not (message := self._connection.recv(timeout=deadline - time.monotonic())):
                continue
        except TimeoutError:
            if self._connection.state is not State.OPEN:
                # What came was against the rules, and the other side goes on sending it.
                raise AttachError("the live log was cut: what the container sends is none") from None
            return b""
        except ConnectionClosedOK:
            return None
        except (ConnectionClosed, OSError) as error:
            raise AttachError(f"the live log was cut: {error}") from None
        return message.encode() if isinstance(message, str) else message

    def close(self) -> None:
        """Leave; also ends a ``read`` in another thread."""
        self._held.close()


@contextlib.contextmanager
def _connection(local_port: int) -> Generator[ClientConnection, None, None]:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    with contextlib.ExitStack() as held:
        try:
            connection = held.enter_context(
                connect(
                    f"ws://127.0.0.1:{local_port}{_PATH}",
                    proxy=None,
                    compression=None,
                    ping_interval=None,
                    max_size=_LARGEST_MESSAGE,
                    open_timeout=_OPEN_SECONDS,
                    close_timeout=_CLOSE_SECONDS,
                    logger=_quiet_logger(),
                )
            )
        except (OSError, EOFError, WebSocketException) as error:
            raise AttachError(f"the runner gives no live log: {error}") from None
        yield connection


def _quiet_logger() -> logging.Logger:
    logger = logging.getLogger(_LOG_CHANNEL)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    return logger
