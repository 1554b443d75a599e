"""Two Prefect servers on one Postgres database, and one address in front of them, as behind a load balancer."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.ports import free_port
from tests.postgres import running_postgres

from . import hosts

# What a second server leaves to the first one. The services that record events and task runs stay: without
# Redis, each server records what is sent to it.
_OF_THE_FIRST = (
    "SCHEDULER",
    "LATE_RUNS",
    "CANCELLATION_CLEANUP",
    "PAUSE_EXPIRATIONS",
    "FOREMAN",
    "REPOSSESSOR",
)


class Balancer:
    """An address whose connections go to the servers in turn, and to the others if one refuses."""

    def __init__(self, *ports: int) -> None:
        self._turns = itertools.cycle(ports)
        self._count = len(ports)
        self._sockets: set[socket.socket] = set()
        self.served = dict.fromkeys(ports, 0)
        self._listener = socket.create_server(("127.0.0.1", free_port()), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close all connections that are open now."""
        for each in list(self._sockets):
            _close(each)

    def close(self) -> None:
        """Close the address and all connections."""
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        for _ in range(self._count):
            port = next(self._turns)
            try:
                server = socket.create_connection(("127.0.0.1", port), timeout=60)
            except OSError:
                continue
            server.settimeout(None)
            self.served[port] += 1
            self._sockets |= {client, server}
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            self._copy(server, client)
            self._sockets -= {client, server}
            return
        _close(client)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        _close(source)
        _close(target)


def _close(each: socket.socket) -> None:
    # Closing alone does not wake a thread that reads from it.
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


@contextmanager
def balanced(*ports: int) -> Iterator[Balancer]:
    """Open an address in front of the servers of these ports."""
    balancer = Balancer(*ports)
    try:
        yield balancer
    finally:
        balancer.close()


class TwoServers:
    """Two Prefect servers on one database: the first has all services, the second none that must be alone."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        database = stack.enter_context(running_postgres()).url.replace("+psycopg2", "+asyncpg")
        self._environment = {**os.environ, "PREFECT_API_DATABASE_CONNECTION_URL": database}
        self._folder = folder
        self.ports = (free_port(), free_port())
        self.first = ExitStack()
        stack.callback(self.first.close)
        # It migrates the database, so the second starts after it.
        self.start_first()
        off = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _OF_THE_FIRST}
        environment = {**self._environment, **off}
        stack.enter_context(
            hosts.prefect_server(self.ports[1], log=folder / "second", environment=environment)
        )
        self.balancer = stack.enter_context(balanced(*self.ports))

    def start_first(self) -> None:
        """Start the first server, again if it was killed."""
        self._process = self.first.enter_context(
            hosts.server_process(self.ports[0], log=self._folder / "first", environment=self._environment)
        )

    def kill_first(self) -> None:
        """Kill the first server."""
        self._process.kill()
        self.first.close()


@contextmanager
def two_servers(folder: Path) -> Iterator[TwoServers]:
    """Start both servers with a database of their own. Raises ``PostgresMissing``."""
    with ExitStack() as stack:
        yield TwoServers(stack, folder)
