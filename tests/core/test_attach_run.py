"""A run is attached, read live and detached, through real SSH logins and a real websocket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from websockets.sync.server import ServerConnection

import dstack_core as dstack
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.runs import parse_run
from dstack_core.aio_run import AsyncRun
from dstack_core.run import Run
from tests.core.scripted import Script, page, recorded, reply, run_json
from tests.core.ssh_hosts import RUN_KEY, RUNNER_PORT, USER, Echo, Host, runner
from tests.ports import free_port

FRAMES = [b"one\r\n", b"\x1b[1mtwo", b"\x1b[0m\r\n"]


def send_all(connection: ServerConnection) -> None:
    assert connection.request is not None
    assert connection.request.path == "/logs_ws"
    for frame in FRAMES:
        connection.send(frame)


class Server:
    """A dstack server with a run whose container is behind two SSH daemons of this machine."""

    def __init__(self, instance: Host, container: Host, ports: dict[int, int]) -> None:
        container.server_keys.add(RUN_KEY.private.get_base64())
        self.running = self._run("running", instance, container, ports)
        self.finished = self._run("done", instance, container, ports)
        user = recorded("users_get_my_user_0.22.5") | {"ssh_private_key": pem()}
        self.script = Script(
            runs__get=[reply(self.running), reply(self.running), reply(self.finished)],
            users__get_my_user=[reply(user)],
            logs__poll=[page((1, "from the server\r\n"))],
        )

    @staticmethod
    def _run(status: str, instance: Host, container: Host, ports: dict[int, int]) -> dict[str, Any]:
        body = run_json(status)
        body["run_spec"]["ssh_key_pub"] = RUN_KEY.public_line
        job = body["jobs"][0]
        job["job_spec"] |= {"user": {"username": USER}}
        job["job_spec"]["app_specs"] = [{"port": port, "map_to_port": local} for port, local in ports.items()]
        job["job_submissions"][-1] |= {
            "termination_reason": "done_by_runner" if status == "done" else None,
            "job_provisioning_data": {
                "hostname": "127.0.0.1",
                "ssh_port": instance.port,
                "username": USER,
                "dockerized": True,
                "ssh_proxy": None,
            },
            "job_runtime_data": {"ports": {"10022": container.port, "10999": 1}},
        }
        return body

    def run(self) -> Run:
        session = Operations(Api("http://s", "main"), 30)
        return Run(session, self.script.send, parse_run(self.running))  # type: ignore[arg-type]

    def arun(self) -> AsyncRun:
        session = Operations(Api("http://s", "main"), 30)
        return AsyncRun(session, self.script.asend, parse_run(self.running))  # type: ignore[arg-type]


def pem() -> str:
    key = RUN_KEY.private.key  # type: ignore[attr-defined]
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    text: bytes = key.private_bytes(*form)
    return text.decode()


@pytest.fixture
def local_port() -> int:
    return free_port()


@pytest.fixture
def server(local_port: int) -> Iterator[Server]:
    with ExitStack() as stack:
        instance, container = (stack.enter_context(closing(Host())) for _ in range(2))
        echo = stack.enter_context(closing(Echo()))
        container.routes = {RUNNER_PORT: stack.enter_context(runner(send_all)), 80: echo.port}
        yield Server(instance, container, {80: local_port})


def echoed(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"hello")
        return connection.recv(5)


def test_a_run_is_attached_read_and_detached(server: Server, local_port: int) -> None:
    run = server.run()
    assert (run.is_attached, dict(run.ports)) == (False, {})
    with run.attach():
        assert (run.is_attached, dict(run.ports)) == (True, {80: local_port})
        asked = len(server.script.requests)
        assert run.attach() is run
        assert len(server.script.requests) == asked
        with run.attach():
            assert run.is_attached
        # The end of an inner block leaves the outer one its tunnel.
        assert echoed(local_port) == b"hello"
        assert b"".join(run.logs()) == b"".join(FRAMES)
    assert (run.is_attached, dict(run.ports)) == (False, {})
    run.detach()
    with pytest.raises(ConnectionRefusedError):
        echoed(local_port)
    assert "logs/poll" not in server.script.paths()
    assert list(run.logs()) == [b"from the server\r\n"]


def test_an_async_run_is_attached_read_and_detached(server: Server, local_port: int) -> None:
    async def scenario() -> None:
        run = server.arun()
        async with await run.attach():
            assert (run.is_attached, dict(run.ports)) == (True, {80: local_port})
            assert await run.attach() is run
            async with run:
                assert run.is_attached
            assert await asyncio.to_thread(echoed, local_port) == b"hello"
            assert b"".join([chunk async for chunk in run.logs()]) == b"".join(FRAMES)
        assert (run.is_attached, dict(run.ports)) == (False, {})
        await run.detach()

    asyncio.run(scenario())
    with pytest.raises(ConnectionRefusedError):
        echoed(local_port)


def test_a_run_with_several_jobs_is_attached_and_its_log_polled(server: Server) -> None:
    for body in (server.running, server.finished):
        body["jobs"].append(body["jobs"][0] | {"job_spec": body["jobs"][0]["job_spec"] | {"job_num": 1}})
    server.script.answers["runs/get"] = [reply(server.running), reply(server.finished)]
    with server.run().attach() as run:
        assert run.is_attached
        assert b"".join(run.logs()).startswith(b"from the server")


def test_a_start_time_selects_the_servers_log(server: Server) -> None:
    server.script.answers["runs/get"] = [reply(server.running), reply(server.finished)]
    with server.run().attach() as run:
        found = parse_run(server.running)

        assert list(run.logs(datetime.fromisoformat(found.submitted_at))) == [b"from the server\r\n"]


def test_a_missing_key_file_is_refused_before_any_request(server: Server) -> None:
    with pytest.raises(
        dstack.ConfigurationError, match=r"/nowhere: expected a private SSH key, got none \(No such file"
    ):
        server.run().attach("/nowhere")
    assert server.script.requests == []


def test_leaving_the_block_with_an_error_detaches_and_stops_nothing(server: Server) -> None:
    run = server.run()
    with pytest.raises(ZeroDivisionError), run.attach():
        raise ZeroDivisionError
    assert not run.is_attached
    assert "runs/stop" not in server.script.paths()
