"""What is open between this process and a run's container."""

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

# So long is waited for a tunnel that is cut at the moment, before the server's copy of the log is read.
_PATIENCE_SECONDS = 10.0


class Attachment:
    """Forward a job's ports and give its live log, over a tunnel that is reopened when it is cut.

    ``one_job`` tells that the run has no other job. When the server tries the job again, ``move`` leads
    the same local ports to the new container.
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
        """Return the job submission whose container this leads to."""
        return self._route.submission_id

    @property
    def is_closed(self) -> bool:
        """Tell whether ``close`` was called."""
        return self._closed

    @property
    def ports(self) -> Mapping[int, int]:
        """Return the local port of each forwarded port of the container."""
        return MappingProxyType({port: forward.local_port for port, forward in self._forwards.items()})

    def open(self, private_key: str | None) -> None:
        """Bind the local ports, log in, and forward.

        ``private_key`` is the one the server keeps for the user (PEM). Raises ``PortInUseError`` and
        ``ConfigurationError`` for local ports, ``AttachError`` for all else.
        """
        self._private_key = private_key
        key = self._choose_key(self._route)
        self._bind(self._route)
        self._tunnel.open(key.private)
        for forward in self._forwards.values():
            forward.start()

    def move(self, route: Route) -> None:
        """Lead to another container of the same job. Raises ``AttachError``."""
        key = self._choose_key(route)
        tunnel = Tunnel(route.hops, self._persistence)
        with self._lock:
            if self._closed:
                raise AttachError("attach: detach() was called meanwhile")
            left, self._tunnel, self._route = self._tunnel, tunnel, route
        left.close()
        tunnel.open(key.private)

    def rest(self) -> None:
        """Stop opening the tunnel again: the run is over. The local ports stay bound until ``close``."""
        self._tunnel.close()

    def open_logs(self) -> LogStream:
        """Return the job's output from its first byte on. Raises ``AttachError``."""
        return LogStream(self.channel(RUNNER_PORT, _PATIENCE_SECONDS))

    def close(self) -> None:
        """Close the tunnel and the local ports; the second time nothing happens."""
        with self._lock:
            self._closed = True
            tunnel = self._tunnel
        tunnel.close()
        for forward in self._forwards.values():
            forward.close()

    def channel(self, port: int, patience: float) -> paramiko.Channel:
        """Return a channel to a port of the container. Raises ``AttachError``."""
        return self._tunnel.channel(port, patience)

    def _choose_key(self, route: Route) -> LoginKey:
        return self._keys.for_run(
            route.public_key, self._private_key, self._identity, any_will_do=route.through_sshproxy
        )

    def _bind(self, route: Route) -> None:
        """Bind the named ports first: a port that may be any must not take one of them."""
        for port in sorted(route.ports, key=lambda port: port.local_port is None):
            with self._lock:
                if self._closed:
                    raise AttachError("attach: detach() was called meanwhile")
                bound = (
                    bind_from(port.container_port)
                    if port.local_port is None
                    else bind(port.local_port, port.container_port)
                )
                self._forwards[port.container_port] = Forward(bound, port.container_port, self)
