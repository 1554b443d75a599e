"""The SSH connections of all clients of the rig."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tests.rig.ssh_listener import SshListener


class ClientConnections:
    """The connections of clients, not of the dstack server, to all SSH daemons: count, cut or refuse them."""

    def __init__(self, listeners: Callable[[], list[SshListener]]) -> None:
        self._listeners = listeners

    def count(self) -> int:
        """Return how many are logged in; one attach has one for each hop."""
        return sum(len(listener.client_connections()) for listener in self._listeners())

    def cut(self) -> int:
        """Cut them all and return how many there were; new ones are accepted at once."""
        return sum(listener.cut_clients() for listener in self._listeners())

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Cut them all, and drop every new one at its login until the exit.

        A container that starts in the meantime accepts connections.
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
