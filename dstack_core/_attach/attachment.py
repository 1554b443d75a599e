"""The open connection between this process and a run's container.

The problem: a caller keeps using the same local ports and reads one log, while below them the SSH connection
breaks and is opened again, and while the server retries the job in another container.

The idea: the local ports belong to the ``Attachment``, not to the connection. Each new connection to a port
asks for a channel at that moment and gets it from whichever ``Tunnel`` is current. ``move`` replaces the
tunnel; ``Tunnel`` itself reconnects.

Invariants: a local port stays bound from ``open`` to ``close``, so no other process takes it in between.
After ``close`` nothing more is opened, not even by a call that was under way in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from dstack_core._attach.forwards import Forward
from dstack_core._attach.keys import LoginKey, LoginKeys
from dstack_core._attach.live_logs import LogStream
from dstack_core._attach.ports import bind, bind_from
from dstack_core._attach.tunnel import Persistence, Tunnel
from dstack_core._wire.attach import RUNNER_PORT, Route
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

# How long to wait for a broken tunnel before the server's copy of the log is read instead. That copy is
# seconds late, so a wait much longer than that shows nothing earlier; much less gives up the live log at
# every short break.
_PATIENCE_SECONDS = 10.0


class Attachment:
    """The forwarded ports and the live log of one job, over a tunnel that reconnects by itself.

    Args:
        route: The hops to the container and the ports to forward.
        keys: The client's SSH keys.
        one_job: Whether the run has no other job, so that the container's output is the run's whole log.
        identity: The key that the caller passed for this attachment alone.
        persistence: How often and how long to try to connect.
    """

    def __init__(
        self,
        route: Route,
        keys: LoginKeys,
        *,
        one_job: bool,
        identity: LoginKey | None = None,
        persistence: Persistence | None = None,
    ) -> None:
        self.one_job = one_job
        self._keys = keys
        self._identity = identity
        self._persistence = persistence or Persistence()
        self._route = route
        self._private_key: str | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._tunnel = Tunnel(route.hops, self._persistence)
        self._forwards: dict[int, Forward] = {}

    @property
    def submission_id(self) -> str:
        """The job submission whose container this is connected to."""
        return self._route.submission_id

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def ports(self) -> Mapping[int, int]:
        """The local port of each forwarded port of the container."""
        return MappingProxyType({port: forward.local_port for port, forward in self._forwards.items()})

    def open(self, private_key: str | None) -> None:
        """Bind the local ports, log in, and forward.

        ``private_key`` is the one that the server keeps for the user (PEM). Raises ``PortInUseError`` and
        ``ConfigurationError`` for local ports, ``AttachError`` for everything else.
        """
        self._private_key = private_key
        key = self._choose_key(self._route)
        # Before the login, which may take long: a taken port is reported at once.
        self._bind(self._route)
        self._tunnel.open(key.private)
        for forward in self._forwards.values():
            forward.start()

    def move(self, route: Route) -> None:
        """Connect to another container of the same job; the local ports stay. Raises ``AttachError``."""
        key = self._choose_key(route)
        tunnel = Tunnel(route.hops, self._persistence)
        with self._lock:
            if self._closed:
                raise AttachError("attach: detach() was called meanwhile")
            left, self._tunnel, self._route = self._tunnel, tunnel, route
        # Outside the lock: closing waits for the old tunnel's thread, and a ``close`` from another thread
        # must not wait for that too.
        left.close()
        tunnel.open(key.private)

    def stop_reconnecting(self) -> None:
        """Close the tunnel for good: the run has ended. The local ports stay bound until ``close``."""
        self._tunnel.close()

    def open_logs(self) -> LogStream:
        """Return the job's output, from its first byte on. Raises ``AttachError``."""
        return LogStream(self.channel(RUNNER_PORT, _PATIENCE_SECONDS))

    def close(self) -> None:
        """Close the tunnel and the local ports; calling it again does nothing."""
        with self._lock:
            self._closed = True
            tunnel = self._tunnel
        tunnel.close()
        for forward in self._forwards.values():
            forward.close()

    def channel(self, port: int, patience: float) -> paramiko.Channel:
        """Return a channel to a port of the container. Raises ``AttachError``."""
        return self._tunnel.channel(port, patience)

    def session(self) -> paramiko.Channel:
        """Return a channel for a shell or command in the container. Raises ``AttachError``."""
        return self._tunnel.session(_PATIENCE_SECONDS)

    def _choose_key(self, route: Route) -> LoginKey:
        return self._keys.for_run(
            route.public_key, self._private_key, self._identity, any_will_do=route.through_sshproxy
        )

    def _bind(self, route: Route) -> None:
        """Bind the named ports first: a port that may be any must not take one of them."""
        # A run on this machine may share its network: the number that its own commands are about to bind
        # is left to them.
        first = 1 if route.is_on_this_machine else 0
        for port in sorted(route.ports, key=lambda port: port.local_port is None):
            with self._lock:
                if self._closed:
                    raise AttachError("attach: detach() was called meanwhile")
                bound = (
                    bind_from(port.container_port + first)
                    if port.local_port is None
                    else bind(port.local_port, port.container_port)
                )
                self._forwards[port.container_port] = Forward(bound, port.container_port, self)
