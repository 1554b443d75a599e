"""Ports of the container on this machine, over a tunnel that is cut and reopened."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import paramiko
import psutil
import pytest

from dstack_core._attach import forwards
from dstack_core._attach.attachment import Attachment
from dstack_core._attach.keys import LoginKeys
from dstack_core._attach.tunnel import Persistence, Tunnel
from dstack_core._wire.attach import AppPort
from dstack_core.errors import AttachError, PortInUseError
from tests.core.ssh_hosts import AT_ONCE, RUN_KEY, Echo, Host, no_thread_of_ours_is_left, route, way
from tests.ports import free_port

BIG = bytes(range(256)) * 8192


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Host())) for _ in range(2)]


@pytest.fixture
def echo() -> Iterator[Echo]:
    with closing(Echo()) as echo:
        yield echo


_nothing_is_left = pytest.fixture(autouse=True)(no_thread_of_ours_is_left)


def new(hosts: list[Host], *ports: AppPort, persistence: Persistence = AT_ONCE) -> Attachment:
    return Attachment(
        route(way(hosts), *ports), LoginKeys(), one_job=True, identity=RUN_KEY, persistence=persistence
    )


def ask(port: int, data: bytes) -> bytes:
    """Send everything, shut down the sending side, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        sender.join()
        return answer


def test_ports_are_forwarded_both_ways_until_each_side_closes(hosts: list[Host], echo: Echo) -> None:
    local = free_port()
    with closing(new(hosts, AppPort(echo.port, local))) as attachment:
        attachment.open(None)
        assert attachment.ports == {echo.port: local}
        assert ask(local, BIG) == BIG
        answers: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(local, BIG[:100_000]))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [BIG[:100_000]] * 8
    with pytest.raises(ConnectionRefusedError):
        ask(local, b"")


def test_an_automatic_port_has_the_same_number_or_the_next_free_one(hosts: list[Host], echo: Echo) -> None:
    # Container and client share this machine, so the container's port is already taken here.
    with closing(new(hosts, AppPort(echo.port, None))) as attachment:
        attachment.open(None)
        local = attachment.ports[echo.port]
        assert local > echo.port
        assert ask(local, b"hello") == b"hello"


def test_a_port_that_a_run_on_this_machine_is_about_to_bind_is_left_to_it(hosts: list[Host]) -> None:
    port = free_port()
    with closing(new(hosts, AppPort(port, None))) as attachment:
        attachment.open(None)
        assert attachment.ports[port] > port
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_is_forwarded_to_itself_does_not_fill_the_machine(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forwards, "_MOST_CONNECTIONS", 8)
    port = free_port()
    with closing(new(hosts, AppPort(port, port))) as attachment:
        attachment.open(None)
        with contextlib.suppress(ConnectionError):
            assert ask(port, b"round and round") == b""
    [warning] = {record.getMessage() for record in caplog.records if record.name == "dstack_core"}
    assert f'forward it to another one, such as with "*:{port}".' in warning


def test_a_fixed_port_is_not_taken_by_an_automatic_one(hosts: list[Host]) -> None:
    port = free_port()
    with closing(new(hosts, AppPort(port, None), AppPort(port + 1, port))) as attachment:
        attachment.open(None)
        assert attachment.ports[port + 1] == port
        assert attachment.ports[port] > port


def test_a_taken_port_is_refused_before_any_login(hosts: list[Host], echo: Echo) -> None:
    with (
        closing(new(hosts, AppPort(80, echo.port))) as attachment,
        pytest.raises(PortInUseError, match=str(echo.port)),
    ):
        attachment.open(None)
    assert hosts[0].logins == []


def test_nothing_of_an_attachment_is_left_when_it_is_closed(hosts: list[Host], echo: Echo) -> None:
    process = psutil.Process()
    local = free_port()
    attachment = new(hosts, AppPort(echo.port, local))
    attachment.open(None)
    with socket.create_connection(("127.0.0.1", local), timeout=30) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        attachment.close()
        assert connection.recv(1) == b""
    attachment.close()
    ours = {local, *(host.port for host in hosts)}
    listening = [
        c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == local
    ]
    assert listening == []
    # paramiko closes a socket from the connection's own thread.
    deadline = time.monotonic() + 20
    while any(
        c.raddr and c.raddr.port in ours and c.status == psutil.CONN_ESTABLISHED
        for c in process.net_connections("tcp")
    ):
        assert time.monotonic() < deadline, "a connection is left open"
        time.sleep(0.01)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_tunnel_that_is_cut_is_reopened_on_the_same_local_ports(
    hosts: list[Host], echo: Echo, bad: int
) -> None:
    local = free_port()
    with closing(new(hosts, AppPort(echo.port, local))) as attachment:
        attachment.open(None)
        for _ in range(3):
            assert hosts[bad].cut_clients() >= 1
            assert ask(local, b"again") == b"again"


def test_a_connection_during_the_outage_waits_for_the_tunnel(hosts: list[Host], echo: Echo) -> None:
    local = free_port()
    with closing(new(hosts, AppPort(echo.port, local))) as attachment:
        attachment.open(None)
        hosts[0].drops = 3
        hosts[0].cut_clients()
        assert ask(local, b"patient") == b"patient"
        assert hosts[0].drops == 0


def test_a_container_whose_host_key_changes_is_not_reconnected_to(hosts: list[Host], echo: Echo) -> None:
    tunnel = Tunnel(way(hosts), AT_ONCE)
    with closing(tunnel):
        tunnel.open(RUN_KEY.private)
        hosts[1].change_host_key()
        hosts[1].cut_clients()
        with pytest.raises(AttachError, match="host key"):
            tunnel.channel(echo.port, patience=30)


def test_an_outage_longer_than_the_budget_ends_the_tunnel(hosts: list[Host], echo: Echo) -> None:
    tunnel = Tunnel(way(hosts), replace(AT_ONCE, reopen_budget=0))
    with closing(tunnel):
        tunnel.open(RUN_KEY.private)
        hosts[0].drops = 1
        hosts[0].cut_clients()
        with pytest.raises(AttachError, match=r"^(instance|container) "):
            tunnel.channel(echo.port, patience=30)
    assert hosts[0].drops == 0


def test_an_ssh_daemon_that_starts_late_is_waited_for(hosts: list[Host]) -> None:
    hosts[1].drops = 9
    with closing(Tunnel(way(hosts), replace(AT_ONCE, attempts=10))) as tunnel:
        tunnel.open(RUN_KEY.private)
    assert hosts[1].drops == 0


def test_the_error_for_a_daemon_that_never_starts_names_the_last_reason(hosts: list[Host]) -> None:
    hosts[1].drops = 99
    with (
        closing(Tunnel(way(hosts), replace(AT_ONCE, attempts=3))) as tunnel,
        pytest.raises(AttachError, match=rf"attach: {way(hosts)[1]}: .*\. Tried 3 times"),
    ):
        tunnel.open(RUN_KEY.private)
    assert hosts[1].drops == 96


def test_closing_ends_an_open_that_is_still_trying(hosts: list[Host]) -> None:
    failed = threading.Event()

    class Watched(Host):
        """A host that reports each connection and refuses it."""

        def connect(self, name: str, port: int) -> socket.socket | None:
            failed.set()
            return None

    errors: list[AttachError] = []
    with closing(Watched()) as gate:
        tunnel = Tunnel(way([gate, hosts[1]]), Persistence(attempts=100, pause=3600))

        def opening() -> None:
            try:
                tunnel.open(RUN_KEY.private)
            except AttachError as error:
                errors.append(error)

        thread = threading.Thread(target=opening)
        thread.start()
        assert failed.wait(30)
        tunnel.close()
        thread.join(30)
        assert not thread.is_alive()
    assert len(errors) == 1


def test_an_attachment_moves_to_another_container_with_its_local_ports(hosts: list[Host], echo: Echo) -> None:
    local = free_port()
    with closing(Host()) as other, closing(new(hosts, AppPort(echo.port, local))) as attachment:
        attachment.open(None)
        [before] = hosts[0].client_connections()
        attachment.move(route(way([other]), submission_id="sub-1"))
        assert attachment.submission_id == "sub-1"
        assert ask(local, b"moved") == b"moved"
        assert len(other.client_connections()) == 1
        before.join(30)
        assert not before.is_active()


def test_a_closed_attachment_does_not_move(hosts: list[Host]) -> None:
    attachment = new(hosts)
    attachment.open(None)
    attachment.close()
    with pytest.raises(AttachError, match=r"detach\(\) was called"):
        attachment.move(route(way(hosts)))


@pytest.mark.parametrize("full", ["accept", "serve", "send"])
def test_a_machine_without_room_for_one_connection_serves_the_next(
    hosts: list[Host], echo: Echo, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    left = [1]
    start, sendall = threading.Thread.start, paramiko.Channel.sendall

    def starting(thread: threading.Thread) -> None:
        # The thread that accepts runs already; this is the one of the first connection, or its second one.
        name = thread._target.__name__  # type: ignore[attr-defined]
        if left[0] and name == {"accept": "_serve", "serve": "_copy_out"}.get(full):
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    def sending(channel: paramiko.Channel, data: bytes) -> None:
        if left[0] and full == "send" and data == b"lost":
            left[0] -= 1
            raise MemoryError
        sendall(channel, data)

    with closing(new(hosts, AppPort(echo.port, free_port()))) as attachment:
        attachment.open(None)
        [local] = attachment.ports.values()
        monkeypatch.setattr(threading.Thread, "start", starting)
        monkeypatch.setattr(paramiko.Channel, "sendall", sending)
        with (
            socket.create_connection(("127.0.0.1", local), timeout=30) as refused,
            contextlib.suppress(ConnectionError),
        ):
            refused.sendall(b"lost")
            assert refused.recv(100) == b""
        assert left == [0]
        assert ask(local, b"next") == b"next"
