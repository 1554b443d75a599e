"""The live log of a job, as the runner in a container serves it: a websocket on port 10999 (PROTOCOL 4.6).

The websocket runs over an SSH channel, in threads of the SSH server. dstack's own client attaches to read it.
One thread reads from the client and answers pings and closes; another one sends the log. Both change the
protocol's state and write to the channel, so both hold the lock while they do. The log is read outside the
lock, because reading blocks until there is more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from urllib.parse import parse_qs, urlsplit

import paramiko
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.server import ServerProtocol

# Bytes to read at once. Clients send only the request, pings and closes, so any size works.
_READ = 65536

Read = Callable[[datetime | None], Iterator[bytes]]


class LiveLog:
    """A client of a job's live log; `read` yields the log from a given time on and ends with the job."""

    def __init__(self, channel: paramiko.Channel, read: Read) -> None:
        self._channel = channel
        self._read = read
        self._protocol = ServerProtocol()
        # The reading thread answers pings and closes while the other one sends the log.
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Serve the client until it leaves, or until the log and the connection have ended."""
        with contextlib.suppress(OSError, EOFError):
            while data := self._channel.recv(_READ):
                with self._lock:
                    self._protocol.receive_data(data)
                    for event in self._protocol.events_received():
                        self._take(event)
                    self._flush()
        self._channel.close()

    def _take(self, event: Request | Frame | object) -> None:
        if not isinstance(event, Request):
            return
        address = urlsplit(event.path)
        if address.path != "/logs_ws":
            self._protocol.send_response(self._protocol.reject(404, "Only the live log is here.\n"))
            return
        self._protocol.send_response(self._protocol.accept(event))
        start = parse_qs(address.query).get("start_time", [None])[0]
        threading.Thread(target=self._send, args=(start,), daemon=True).start()

    def _send(self, start: str | None) -> None:
        with contextlib.suppress(OSError, EOFError):
            # Fractions of a second are ignored (PROTOCOL 4.6).
            after = datetime.fromisoformat(start).replace(microsecond=0) if start else None
            for text in self._read(after):
                with self._lock:
                    self._protocol.send_binary(text)
                    self._flush()
            with self._lock:
                self._protocol.send_close(1000)
                self._flush()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._channel.sendall(data)
            else:
                self._channel.shutdown_write()
