"""SSH daemons on loopback that stand for the hops to a container, with the faults a test needs."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import paramiko
from websockets.sync.server import ServerConnection, serve

from dstack_core._attach.keys import LoginKey
from dstack_core._attach.tunnel import Persistence
from dstack_core._wire.attach import RUNNER_PORT, AppPort, Hop, Route
from tests.rig.ssh_host import SshHost, _HostSession

USER = "worker"
ROLES = ("jump host", "instance", "container")
AT_ONCE = Persistence(attempts=1, pause=0, reopen_budget=60, longest_pause=0.2)
RUN_KEY = LoginKey("the test's key", paramiko.RSAKey.generate(2048))


class Host(SshHost):
    """A daemon that lets one user in with the run's key; it cuts off the first `drops` logins."""

    def __init__(self, host_key: paramiko.PKey | None = None, key: paramiko.PKey = RUN_KEY.private) -> None:
        self.drops = 0
        self.logins: list[str] = []
        super().__init__(host_key or paramiko.ECDSAKey.generate())
        self._open_session = lambda _: _Session(self)
        self.client_keys.add(key.get_base64())

    def change_host_key(self) -> None:
        """Show another host key to the next client."""
        self._host_key = paramiko.ECDSAKey.generate()


class _Session(_HostSession):
    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._faulty = host

    def knows(self, username: str, key: paramiko.PKey) -> bool:
        self._faulty.logins.append(username)
        if self._faulty.drops:
            self._faulty.drops -= 1
            raise EOFError
        return super().knows(username, key) and username == USER


class Echo:
    """An echo server on a free port."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=_send_back, args=(connection,), daemon=True).start()


def _send_back(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(65536):
            connection.sendall(data)


@contextlib.contextmanager
def runner(behave: Callable[[ServerConnection], None]) -> Iterator[int]:
    """Serve a websocket and yield its port."""
    with serve(behave, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()


def way(hosts: Sequence[SshHost]) -> list[Hop]:
    """Return the hops through the given hosts; the last one is the container."""
    roles = ROLES[len(ROLES) - len(hosts) :]
    return [Hop(role, "127.0.0.1", host.port, USER) for role, host in zip(roles, hosts, strict=True)]


def route(hops: Sequence[Hop], *ports: AppPort, submission_id: str = "sub-0") -> Route:
    """Return the route of a run that was submitted with the test's key."""
    return Route("train", submission_id, hops, ports, RUN_KEY.public_line)


def no_thread_of_ours_is_left() -> Iterator[None]:
    """Fail if a thread of this package outlives the test's attachments. Used as a fixture."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("dstack-")]
    assert left == []


__all__ = [
    "AT_ONCE",
    "RUNNER_PORT",
    "RUN_KEY",
    "USER",
    "Echo",
    "Host",
    "no_thread_of_ours_is_left",
    "route",
    "runner",
    "way",
]
