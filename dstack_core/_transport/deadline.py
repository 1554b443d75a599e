"""Bound the time of a whole reply, its head included, where a socket only bounds each wait for bytes."""

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
    """A reply was not complete in time."""


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
        """Make the pools for what is reached directly."""
        super().init_poolmanager(*args, **options)
        self._bound(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Make the pools for what is reached through a proxy."""
        return self._bound(super().proxy_manager_for(*args, **options))

    def _bound(self, manager: PoolManager) -> PoolManager:
        # Pools that speak SOCKS are left as they are.
        if manager.pool_classes_by_scheme is pool_classes_by_scheme:
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(deadline: ReplyDeadline) -> dict[str, type[HTTPConnectionPool]]:
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
