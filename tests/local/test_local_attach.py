"""SSH access to jobs: the live log, the ports, and which keys may log in."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import paramiko
import psutil
import pytest
import requests

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.local.support import Api, wait_until
from tests.ports import free_port

logging.getLogger("paramiko").setLevel(logging.CRITICAL)


@pytest.fixture
def client(shared_server: LocalServer) -> dstack.Client:
    return shared_server.client()


def test_an_attached_run_has_a_live_log(client: dstack.Client, name: str) -> None:
    run = client.runs.submit(
        dstack.Task(commands=["echo one", "read -t 1 || true", "echo two", "sleep 1", "exit 3"]),
        run_name=name,
    )
    with run.attach(poll_interval=0.05):
        assert run.is_attached
        assert b"".join(run.logs()) == b"one\r\ntwo\r\n"
        assert run.wait(30, poll_interval=0.05).exit_status == 3


def test_ports_of_a_run_are_forwarded(client: dstack.Client, name: str) -> None:
    port = free_port()
    commands = ["echo page > index.html", f"exec python3 -m http.server {port} --bind 127.0.0.1"]
    run = client.runs.submit(dstack.Task(commands=commands, ports=[f"*:{port}"]), run_name=name)
    with run.attach(poll_interval=0.05):
        local = run.ports[port]
        assert local != 0

        def page() -> str:
            try:
                return requests.get(f"http://localhost:{local}", timeout=5).text
            except requests.RequestException:
                return ""

        # A Python that starts on a busy machine takes its time.
        assert wait_until(page, 60) == "page\n"
        run.stop(abort=True)


def _hops(run: Any) -> tuple[int, int]:
    job = run["latest_job_submission"]
    return job["job_provisioning_data"]["ssh_port"], job["job_runtime_data"]["ports"]["10022"]


def _login(way: Any, key: paramiko.PKey) -> paramiko.Transport:
    transport = paramiko.Transport(way)
    transport.connect(username="root", pkey=key)
    return transport


def test_only_the_keys_of_a_run_may_log_in(api: Api, name: str) -> None:
    own, other = paramiko.RSAKey.generate(2048), paramiko.RSAKey.generate(2048)
    for key, run in ((own, name), (other, f"{name}-other")):
        spec = {"ssh_key_pub": f"ssh-rsa {key.get_base64()} me"}
        api.apply(run, "sleep 300", spec=spec)
    host, number = _hops(api.wait(name, "running"))
    api.wait(f"{name}-other", "running")
    with pytest.raises(paramiko.AuthenticationException):
        _login(("127.0.0.1", host), paramiko.RSAKey.generate(2048))
    for key, may_log_in in ((own, True), (other, False)):
        with _login(("127.0.0.1", host), key) as outer:
            way = outer.open_channel("direct-tcpip", ("localhost", number), ("127.0.0.1", 0))
            if not may_log_in:
                with pytest.raises(paramiko.AuthenticationException):
                    _login(way, key)
                continue
            with _login(way, key) as inner:
                session = inner.open_session()
                session.exec_command("exit 3")
                assert session.recv_exit_status() == 3
                for elsewhere in (("example.org", 80), ("localhost", free_port())):
                    with pytest.raises(paramiko.ChannelException):
                        inner.open_channel("direct-tcpip", elsewhere, ("127.0.0.1", 0))
            session = outer.open_session()
            with pytest.raises(paramiko.SSHException):
                session.exec_command("true")
            with pytest.raises(paramiko.ChannelException):
                outer.open_channel("direct-tcpip", ("localhost", 22), ("127.0.0.1", 0))
    for run in (name, f"{name}-other"):
        api.stop(run, abort=True)


def test_ssh_listens_only_on_this_machine(api: Api, name: str) -> None:
    api.apply(name, "sleep 300")
    host, _ = _hops(api.wait(name, "running"))
    api.stop(name, abort=True)
    listening = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [one.laddr.ip for one in listening if one.laddr.port == host] == ["127.0.0.1"]


def test_stopping_a_server_disconnects_attached_clients(make: Callable[..., Api]) -> None:
    api = make()
    key = paramiko.RSAKey.generate(2048)
    api.apply("cut", "sleep 300", spec={"ssh_key_pub": f"ssh-rsa {key.get_base64()} me"})
    host, _ = _hops(api.wait("cut", "running"))
    with _login(("127.0.0.1", host), key) as transport:
        api.server.stop()
        wait_until(lambda: not transport.is_active())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", host))
