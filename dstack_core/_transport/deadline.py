"""Bound the time of a whole reply, its head included, where a socket only bounds each wait for bytes.

The problem: ``requests`` bounds the wait for each piece of a reply. A server that sends a byte a second, in
the head or in the body, holds a caller forever, and there is no hook to end that.

The idea: the deadline sits below the HTTP parser. ``DeadlineAdapter`` gives urllib3 connection pools whose
replies read from the socket through ``_Until``, which raises ``TooSlow`` at the first read after the
deadline. So it bounds everything that is read: status line, headers (``100 Continue`` too), chunk sizes and
body.

Invariants: a reply ends at most one read timeout after its deadline. Connections are pooled as usual. Only
public names of requests and urllib3 are used.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.poolmanager import pool_classes_by_scheme


class TooSlow(Exception):
    """The error for a reply that was not complete in time."""


@dataclass(slots=True)
class ReplyDeadline:
    """The seconds that the next reply of one session may take, set before each request.

    A session belongs to one thread, so no two requests share it at the same time.
    """

    seconds: float = float("inf")


class DeadlineAdapter(HTTPAdapter):
    """An adapter that raises ``TooSlow`` when a reply takes too long, however many bytes keep coming."""

    def __init__(self, deadline: ReplyDeadline) -> None:
        self._pools = _pools(deadline)
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools for servers that are reached directly."""
        super().init_poolmanager(*args, **options)
        self._bound(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Make the pools for servers that are reached through a proxy."""
        return self._bound(super().proxy_manager_for(*args, **options))

    def _bound(self, manager: PoolManager) -> PoolManager:
        # Pools for SOCKS are classes of their own and stay as they are: only the read timeout bounds those.
        if manager.pool_classes_by_scheme is pool_classes_by_scheme:
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(deadline: ReplyDeadline) -> dict[str, type[HTTPConnectionPool]]:
    # urllib3 and http.client find each next class in an attribute of the class above it, so the session's
    # deadline can only reach the reply through classes that are made for it.
    class Timed(HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp = io.BufferedReader(_Until(time.monotonic() + deadline.seconds, self.fp.detach()))

    class Plain(HTTPConnection):
        response_class = Timed

    class Encrypted(HTTPSConnection):
        response_class = Timed

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    return {"http": PlainPool, "https": EncryptedPool}


class _Until(io.RawIOBase):
    """A stream that raises ``TooSlow`` at the first read after ``deadline``, on the monotonic clock."""

    def __init__(self, deadline: float, source: io.RawIOBase) -> None:
        self._deadline = deadline
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TooSlow
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()
