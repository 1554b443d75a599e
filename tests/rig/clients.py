"""The SSH connections of clients, as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tests.rig.ssh_listener import SshListener


class ClientConnections:
    """Count, cut and refuse what clients, not the dstack server, have open to any SSH daemon of the rig."""

    def __init__(self, listeners: Callable[[], list[SshListener]]) -> None:
        self._listeners = listeners

    def count(self) -> int:
        """Return how many are logged in; one attach has one for every hop."""
        return sum(len(listener.client_connections()) for listener in self._listeners())

    def cut(self) -> int:
        """Cut them all and return how many there were; new ones are welcome at once."""
        return sum(listener.cut_clients() for listener in self._listeners())

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Cut them all, and drop every new one at its login until the exit.

        A container that starts meanwhile accepts connections.
        """
        listeners = self._listeners()
        for listener in listeners:
            listener.refusing = True
        try:
            self.cut()
            yield
        finally:
            for listener in listeners:
                listener.refusing = False
