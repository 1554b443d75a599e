"""Keep the way to a container open: log in, and again whenever the connection is cut."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from urllib3.exceptions import HTTPError
from urllib3.util.retry import Retry

from dstack_core._attach.hops import Chain, LostError
from dstack_core._attach.host_keys import HostKeyError, HostKeys
from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger("dstack_core")


@dataclass(frozen=True, slots=True)
class Persistence:
    """Say how stubborn a tunnel is.

    At first ``attempts`` tries, ``pause`` seconds apart: a container's SSH daemon may come up after the
    container (PROTOCOL 4.4). Once it stood, it is opened again for up to ``reopen_budget`` seconds, with
    pauses that grow up to ``longest_pause``.
    """

    attempts: int = 10
    pause: float = 1.0
    reopen_budget: float = 600.0
    longest_pause: float = 20.0


class Tunnel:
    """Hold one chain of logins; a thread of its own opens it again when it is cut."""

    def __init__(self, hops: Sequence[Hop], persistence: Persistence) -> None:
        self._hops = hops
        self._persistence = persistence
        self._host_keys = HostKeys()
        self._chain: Chain | None = None
        self._opening: Chain | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._lost: AttachError | None = None
        self._keeper: threading.Thread | None = None

    def open(self, key: paramiko.PKey) -> None:
        """Log in, with the patience of the first time. Raises ``AttachError`` of the last try."""
        for attempt in range(1, self._persistence.attempts + 1):
            try:
                self._log_in(key)
                break
            except HostKeyError:
                raise
            except AttachError as error:
                if attempt == self._persistence.attempts:
                    raise AttachError(
                        f"attach: {error.message.removesuffix('.')}. Tried {attempt} times."
                    ) from None
            if self._closing.wait(self._persistence.pause):
                raise AttachError("attach: detach() was called meanwhile")
        self._keeper = threading.Thread(target=self._keep, args=(key,), name="dstack-tunnel", daemon=True)
        self._keeper.start()

    def channel(self, port: int, patience: float) -> paramiko.Channel:
        """Return a channel to a port of the container; while the tunnel is cut, wait ``patience`` seconds.

        Raises ``AttachError``.
        """
        deadline = time.monotonic() + patience
        while True:
            chain = self._wait_for_chain(deadline - time.monotonic())
            try:
                return chain.channel(port, patience)
            except LostError:
                # The thread that waits for the end may not have heard of it yet.
                chain.close()

    def close(self) -> None:
        """Cut the connections and end the thread; also ends an ``open`` in another thread."""
        self._closing.set()
        with self._changed:
            chains, self._chain = (self._chain, self._opening), None
            self._changed.notify_all()
        for chain in chains:
            if chain is not None:
                chain.close()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join()

    def _wait_for_chain(self, patience: float) -> Chain:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_up() or self._lost or self._closing.is_set(), timeout=patience
            )
            if self._chain is not None and self._is_up():
                return self._chain
        raise self._lost or AttachError("attach: the connection to the container was lost")

    def _is_up(self) -> bool:
        return self._chain is not None and self._chain.is_open

    def _log_in(self, key: paramiko.PKey) -> None:
        chain = Chain()
        with self._changed:
            self._opening = chain
        try:
            chain.open(self._hops, key, self._host_keys)
        except BaseException:
            chain.close()
            raise
        with self._changed:
            self._opening = None
            if not self._closing.is_set():
                self._chain = chain
                self._changed.notify_all()
                return
        chain.close()
        raise AttachError("attach: detach() was called meanwhile")

    def _keep(self, key: paramiko.PKey) -> None:
        while True:
            with self._changed:
                chain = self._chain
            if chain is None:
                return
            chain.wait_until_cut()
            chain.close()
            if self._closing.is_set():
                return
            _log.info("The SSH connection to %s was lost. Reconnecting.", self._hops[-1])
            try:
                self._reopen(key)
            except AttachError as error:
                with self._changed:
                    self._lost, self._chain = error, None
                    self._changed.notify_all()
                if not self._closing.is_set():
                    _log.warning("Could not reconnect to %s over SSH: %s", self._hops[-1], error)
                return

    def _reopen(self, key: paramiko.PKey) -> None:
        backoff = Retry(
            total=None, backoff_factor=0.25, backoff_max=self._persistence.longest_pause, backoff_jitter=0.5
        )
        deadline = time.monotonic() + self._persistence.reopen_budget
        while True:
            try:
                return self._log_in(key)
            except HostKeyError:
                raise
            except AttachError as error:
                if time.monotonic() >= deadline or self._closing.is_set():
                    raise
                backoff = backoff.increment(error=HTTPError(error.message))
            self._closing.wait(backoff.get_backoff_time())
