"""The chain of SSH logins to a container, opened again whenever it breaks.

The problem: a connection that lasts as long as a training run breaks at some point, and several threads (one
for each forwarded connection, one that reads the log) notice it at different moments, or not at all.

The idea: one thread, the keeper, waits for the end of the current ``Chain`` and replaces it. Everyone else
gets channels from ``channel``, which waits under one condition until a chain is up, the keeper has given up,
or the tunnel is closed.

Invariants:
  * At most one chain is up, and only the keeper (before it, ``open``) makes one.
  * ``close`` ends everything: it closes the chain in use and the one being opened, wakes all waiting threads,
    and waits for the keeper.
  * A host key that differs ends the tunnel at once; trying again would only ask the wrong machine again.
"""

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
    """How often and how long a tunnel tries to connect.

    Args:
        attempts: Tries for the first connection: a container's SSH daemon may start after the container.
        pause: Seconds between these tries.
        reopen_budget: Seconds for which a connection that broke is opened again.
        longest_pause: Most seconds between these tries; the pauses grow up to it.
    """

    # As dstack's own client: 10 tries, 1 s apart (PROTOCOL 4.4). Fewer fail on containers that start slowly.
    attempts: int = 10
    pause: float = 1.0
    # The same 10 minutes for which following a run retries an unreachable server: the restart of a machine or
    # a network. After it the server's copy of the log is read, and forwarded ports close new connections.
    reopen_budget: float = 600.0
    # Chosen, not measured: the end of a long break is noticed at most this late; a try is cheap for both
    # sides.
    longest_pause: float = 20.0


class Tunnel:
    """One chain of logins, which a thread of its own opens again when it breaks."""

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
        """Log in, with the tries for a first connection. Raises the ``AttachError`` of the last try."""
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
        """Return a channel to a port of the container; while the tunnel is broken, wait ``patience`` seconds.

        Raises ``AttachError``.
        """
        deadline = time.monotonic() + patience
        while True:
            chain = self._wait_for_chain(deadline - time.monotonic())
            try:
                return chain.channel(port, patience)
            except LostError:
                # The keeper may not have noticed yet. Closing makes it, and the next turn waits for a new
                # chain.
                chain.close()

    def session(self, patience: float) -> paramiko.Channel:
        """Return a channel for a shell or command; while the tunnel is broken, wait ``patience`` seconds.

        Raises ``AttachError``.
        """
        return self._wait_for_chain(patience).session(patience)

    def close(self) -> None:
        """Close the connections and end the thread; also ends an ``open`` in another thread."""
        self._closing.set()
        with self._changed:
            chains, self._chain = (self._chain, self._opening), None
            self._changed.notify_all()
        # Outside the condition: the keeper needs it to end.
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
        # Known before it is open, so that ``close`` can interrupt a login that hangs.
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
        # ``close`` began while the login was finishing, and no longer saw this chain.
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
        # The jitter spreads the logins of all the tunnels that broke with the same machine.
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
