"""The async client for many runs at once: it watches thousands of them with a handful of requests."""

from __future__ import annotations

from typing import ClassVar

from dstack_core._shared.batched_polls import LONGEST_LOG_PAUSE
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core.aio import AsyncClient


class SharedAsyncClient(AsyncClient):
    """An ``AsyncClient`` that shares its work with the others of its kind in the same event loop.

    Use it to watch many runs in one process. Parameters and errors are those of ``Client``, and every method
    means the same. What differs:

    * Clients with equal server, token and limits have one set of connections, which is closed with the last
      of them.
    * Polls of one project's runs that come at about the same time are answered from pages of 100 active runs
      instead of a request each; a run that is on no such page is polled alone. No answer is older than its
      question.
    * Without a ``sleep`` of the caller's own, ``follow`` and ``wait`` poll at multiples of ``poll_interval``
      on the clock, at most a second late, so that runs watched with the same interval are polled together. A
      poll that shows nothing new wakes no follower.
    * After this process stood still for more than 8 seconds, replies are held back for 8 seconds, because
      another process may have taken over.

    Source: PROTOCOL 1.7.
    """

    _longest_log_pause: ClassVar[float] = LONGEST_LOG_PAUSE

    def _new_transport(self, settings: TransportSettings) -> AsyncTransport:
        return SharedTransport(settings)
