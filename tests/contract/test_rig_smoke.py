"""The rig itself: real runs on a real server, observed through plain requests and plain SSH."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests
import websockets

from tests.rig.channels import join_in_background
from tests.rig.server import RealServer
from tests.rig.ssh_keys import new_key_pair, private_key

pytestmark = pytest.mark.real

LINES = 5000
FINISHED = {"done", "failed", "terminated"}
DEADLINE = 240.0
POLL = 0.2
STOP_AGAIN = 20.0


class Api:
    """The API calls that the smoke test needs."""

    def __init__(self, server: RealServer) -> None:
        self._server = server
        self._key = new_key_pair()
        self.key = private_key(self._key.private)
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {server.token}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self._server.url}/api/project/{self._server.project}/{path}"
        reply = self._session.post(url, json=body, timeout=30)
        assert reply.ok, reply.text
        return reply.json()

    def submit(self, *commands: str, **more: Any) -> str:
        name = f"rig-{uuid.uuid4().hex[:12]}"
        configuration = {"type": "task", "commands": commands, **more}
        if "image" not in more:
            configuration["user"] = "root"
        if self._server.release >= (0, 19, 3):
            configuration["fleets"] = [self._server.fleet]
        spec = {"run_name": name, "configuration": configuration, "ssh_key_pub": self._key.public}
        self.post("runs/apply", {"plan": {"run_spec": spec}, "force": False})
        return name

    def wait(self, name: str, wanted: set[str], began: float, marks: dict[str, float]) -> dict[str, Any]:
        while True:
            run: dict[str, Any] = self.post("runs/get", {"run_name": name})
            marks.setdefault(run["status"], round(time.monotonic() - began, 1))
            if run["status"] in wanted:
                return run
            if run["status"] in FINISHED or time.monotonic() - began > DEADLINE:
                pytest.fail(f"{name} is {run['status']}: {run['jobs']}\n{self._server.log_tail()}")
            time.sleep(POLL)

    def log(self, run: dict[str, Any], job: int = 0) -> str:
        submission = run["jobs"][job]["job_submissions"][-1]["id"]
        body = {"run_name": run["run_spec"]["run_name"], "job_submission_id": submission, "limit": 1000}
        return b"".join(self._messages(body)).decode()

    def _messages(self, body: dict[str, Any]) -> Iterator[bytes]:
        page = self.post("logs/poll", body)
        while True:
            yield from (base64.b64decode(entry["message"]) for entry in page["logs"])
            if page.get("next_token") is None:
                return
            page = self.post("logs/poll", {**body, "next_token": page["next_token"]})

    def stop(self, name: str, began: float, marks: dict[str, float]) -> dict[str, Any]:
        """Stop a run, and repeat the stop: since 0.20 the server may overwrite it with what it does at that moment."""
        asked = float("-inf")
        while True:
            if time.monotonic() - asked > STOP_AGAIN:
                self.post("runs/stop", {"runs_names": [name], "abort": False})
                asked = time.monotonic()
            run: dict[str, Any] = self.post("runs/get", {"run_name": name})
            if run["status"] in FINISHED:
                marks[run["status"]] = round(time.monotonic() - began, 1)
                return run
            if time.monotonic() - began > DEADLINE:
                pytest.fail(f"{name} is {run['status']}: {run['jobs']}\n{self._server.log_tail()}")
            time.sleep(POLL)


def run_to_its_end(server: RealServer, command: str) -> tuple[dict[str, Any], str, dict[str, float]]:
    api = Api(server)
    marks: dict[str, float] = {}
    began = time.monotonic()
    run = api.wait(api.submit(command), FINISHED, began, marks)
    return run, api.log(run), marks


def exit_status(run: dict[str, Any]) -> int | None:
    status: int | None = run["jobs"][0]["job_submissions"][-1].get("exit_status")
    return status


def test_runs_execute_at_the_same_time_and_their_logs_arrive_whole(
    real_server: RealServer, record_property: Callable[[str, object], None]
) -> None:
    commands = [
        f'for i in $(seq {LINES}); do echo "$i ✓ é 日本"; done',
        "echo before; exit 7",
        "no-such-command",
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        done, failed, missing = pool.map(lambda command: run_to_its_end(real_server, command), commands)
    record_property("boot_seconds", real_server.boot_seconds)
    record_property("fleet_idle_seconds", real_server.idle_seconds)
    record_property("seconds_to_each_status", [marks for _, _, marks in (done, failed, missing)])
    run, log, _ = done
    assert run["status"] == "done"
    assert log.splitlines() == [f"{number} ✓ é 日本" for number in range(1, LINES + 1)]
    reports_exit_status = real_server.release >= (0, 19, 9)
    run, log, _ = failed
    assert (run["status"], exit_status(run)) == ("failed", 7 if reports_exit_status else None)
    assert log.splitlines()[0] == "before"
    run, _, _ = missing
    assert (run["status"], exit_status(run)) == ("failed", 127 if reports_exit_status else None)


def test_a_run_can_be_stopped(
    real_server: RealServer, record_property: Callable[[str, object], None]
) -> None:
    api = Api(real_server)
    marks: dict[str, float] = {}
    began = time.monotonic()
    name = api.submit("trap 'echo interrupted; exit 1' INT; echo ready; sleep 600 & wait")
    run = api.wait(name, {"running"}, began, marks)
    while "ready" not in api.log(run):
        assert time.monotonic() - began < DEADLINE
        time.sleep(POLL)
    began = time.monotonic()
    run = api.stop(name, began, marks)
    assert run["status"] == "terminated"
    record_property("seconds_to_terminated", marks["terminated"])
    assert run["termination_reason"] == "stopped_by_user"
    # Servers before 0.22 no longer read the log once they have stopped a run.
    assert ("interrupted" in api.log(run)) == (real_server.release >= (0, 22))


@contextlib.contextmanager
def container_of(server: RealServer, api: Api, run: dict[str, Any]) -> Iterator[paramiko.Transport]:
    """Log in to the container of a run as a client does."""
    submission = run["jobs"][0]["job_submissions"][-1]
    host = submission["job_provisioning_data"]
    inside = int(submission["job_runtime_data"]["ports"]["10022"])
    way = [
        (host["hostname"], host["ssh_port"], host["username"], api.key),
        ("localhost", inside, "root", api.key),
    ]
    if host["ssh_proxy"] is not None:
        proxy = host["ssh_proxy"]
        jump_key = paramiko.RSAKey.from_private_key_file(str(server.jump_key_path))
        way.insert(0, (proxy["hostname"], proxy["port"], proxy["username"], jump_key))
    with contextlib.ExitStack() as opened:
        hops: list[paramiko.Transport] = []
        for name, port, user, key in way:
            if hops:
                transport = paramiko.Transport(hops[-1].open_channel("direct-tcpip", (name, port), ("", 0)))
            else:
                transport = paramiko.Transport(socket.create_connection((name, port)))
            hops.append(opened.enter_context(transport))
            transport.connect(username=user, pkey=key)
        yield hops[-1]


@contextlib.contextmanager
def forwarded(container: paramiko.Transport, port: int) -> Iterator[int]:
    """Forward a port of the container to this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError, paramiko.SSHException):
                while True:
                    connection, _ = listening.accept()
                    channel = container.open_channel("direct-tcpip", ("localhost", port), ("", 0))
                    join_in_background(connection, channel)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


async def live_log(port: int, *, until: bytes = b"", start_time: str = "") -> bytes:
    """Read the websocket until the wanted bytes arrive or it is closed."""
    query = f"?start_time={start_time}" if start_time else ""
    log = b""
    async with websockets.connect(f"ws://127.0.0.1:{port}/logs_ws{query}", proxy=None) as frames:
        # A container that has ended may be removed before its runner has sent a close frame.
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for frame in frames:
                assert isinstance(frame, bytes)
                log += frame
                if until and until in log:
                    break
    return log


async def live_logs(port: int, **options: Any) -> list[bytes]:
    return list(await asyncio.gather(live_log(port, **options), live_log(port, **options)))


def test_a_container_has_its_command_its_variables_its_port_and_a_live_log(
    real_server: RealServer, tmp_path: Path
) -> None:
    api = Api(real_server)
    launcher = tmp_path / "text-generation-launcher"
    serve = shlex.join([sys.executable, "-m", "http.server", "--bind", "127.0.0.1"])
    launcher.write_text(
        f"#!/bin/sh\necho $1 $DSTACK_RUN_NAME; printf '\\033[31mred\\033[0m'; exec {serve} $PORT\n"
    )
    launcher.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    real_server.container.path.append(tmp_path)
    real_server.container.routes[80] = port
    name = api.submit(
        "text-generation-launcher --model",
        image="ghcr.io/huggingface/text-generation-inference:latest",
        ports=["8080:80"],
        env={"PORT": str(port)},
    )
    began = time.monotonic()
    run = api.wait(name, {"running"}, began, {})
    colour = b"\x1b[31mred\x1b[0m"
    with container_of(real_server, api, run) as container, forwarded(container, 10999) as runner:
        first, second = asyncio.run(live_logs(runner, until=colour))
        assert first == second == f"--model {name}\r\n".encode() + colour
        with forwarded(container, 80) as app:
            while True:
                with contextlib.suppress(requests.RequestException):
                    assert requests.get(f"http://127.0.0.1:{app}/", timeout=30).ok
                    break
                assert time.monotonic() - began < DEADLINE
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(asyncio.run, live_log(runner, start_time="2100-01-01T00:00:00Z"))
            api.stop(name, began, {})
            assert late.result(DEADLINE) == b"", "closed at the end of the job, and nothing is that young"


def test_clients_reconnect_after_being_cut_off_and_refused(real_server: RealServer) -> None:
    api = Api(real_server)
    name = api.submit("sleep 600")
    began = time.monotonic()
    run = api.wait(name, {"running"}, began, {})
    with container_of(real_server, api, run) as container:
        assert real_server.clients.count() == 2
        assert real_server.clients.cut() == 2
        container.join(DEADLINE)
        assert not container.is_active()
    with (
        real_server.clients.refused(),
        pytest.raises(paramiko.SSHException),
        container_of(real_server, api, run),
    ):
        pass
    with container_of(real_server, api, run) as container:
        assert container.is_active()
    assert api.stop(name, began, {})["status"] == "terminated"


def test_two_nodes_behind_a_jump_host(real_server: RealServer) -> None:
    project = f"{real_server.project}-jump"
    with RealServer(at=real_server.address, project=project, hosts=2, blocks=1, jump_host=True) as server:
        api = Api(server)
        name = api.submit("echo node $DSTACK_NODE_RANK of $DSTACK_NODES_NUM", "read line", nodes=2)
        began = time.monotonic()
        run = api.wait(name, {"running"}, began, {})
        while {job["job_submissions"][-1]["status"] for job in run["jobs"]} != {"running"}:
            run = api.wait(name, {"running"}, began, {})
            time.sleep(POLL)
        with container_of(server, api, run):
            assert server.clients.count() == 3
        while not all(logs := [api.log(run, job).strip() for job in (0, 1)]):
            assert time.monotonic() - began < DEADLINE
            time.sleep(POLL)
        assert logs == ["node 0 of 2", "node 1 of 2"]
        api.stop(name, began, {})
