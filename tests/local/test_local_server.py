"""The life of a server: starting, stopping, what is left behind, and injected faults."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import requests

from dstack_core.local import LocalServer
from tests.local.server_process import first_words
from tests.local.support import Api, alive, task, wait_until

ROOT = Path(__file__).parents[2]
# Processes in the job's group, in a group of their own, in a session of their own, and without the environment.
HORDE = (
    "trap '' INT TERM HUP; sleep 300 & echo pid $!; (set -m; sleep 300 & echo pid $!); "
    "setsid sleep 300 & echo pid $!; env -i sleep 300 & echo pid $!; echo pid $$; echo ready; wait"
)


def _horde(api: Api) -> list[int]:
    api.apply("horde", HORDE)
    lines = api.output(api.wait_output("horde", "ready")).splitlines()
    pids = [int(line.split()[1]) for line in lines if line.startswith("pid")]
    assert len(pids) == 5
    assert all(alive(pid) for pid in pids)
    return pids


def test_stop_leaves_nothing_behind() -> None:
    server = LocalServer(step_seconds=0.01)
    with server:
        pids = _horde(Api(server))
        directory = server.directory
        assert directory is not None
        assert directory.is_dir()
        url = server.url
    assert [pid for pid in pids if alive(pid)] == []
    assert not directory.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthcheck", timeout=5)
    server.stop()


def test_finished_jobs_leave_no_files(api: Api, name: str) -> None:
    assert api.server.directory is not None
    run = api.run(name, "mkdir -p a/b; echo x > a/b/c; chmod 500 a/b")
    assert not (api.server.directory / "jobs" / run["latest_job_submission"]["id"]).exists()


def test_server_can_be_started_again() -> None:
    server = LocalServer(step_seconds=0.01)
    for _ in range(2):
        with server:
            api = Api(server)
            assert api.ok("runs/list", {}) == []
            assert api.run("again", "true")["status"] == "done"
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.url


def test_servers_are_independent_of_each_other(make: Callable[..., Api]) -> None:
    one, two = make(project="one"), make(project="two")
    one.run("same", "echo one")
    assert two.ok("runs/list", {}) == []
    assert one.call("projects/two/get").status_code == 404
    two.session.headers["Authorization"] = f"Bearer {one.server.token}"
    assert two.call("runs/list", {}).status_code == 403


def test_token_is_not_shown() -> None:
    server = LocalServer(token="very-secret")
    assert "very-secret" not in repr(server)
    with server:
        assert "very-secret" not in repr(server)
        assert server.url in repr(server)


def test_busy_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = LocalServer(port)
        with pytest.raises(OSError, match=f"Port {port} of 127.0.0.1 is already in use"):
            server.start()
        server.stop()
        done = subprocess.run(
            [sys.executable, "-m", "dstack_core.local", "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Port {port} of 127.0.0.1 is already in use\n"


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_port_out_of_range_is_one_clear_error_and_leaves_no_socket() -> None:
    # An open socket warns once it is collected.
    server = LocalServer(70000)
    with pytest.raises(ValueError, match=r"^port: expected 0 to 65535, got 70000\.$"):
        server.start()
    del server
    gc.collect()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "localhost", "example.org"])
def test_only_loopback_can_be_listened_on(address: str) -> None:
    for name in ("host", "address", "bind"):
        with pytest.raises(TypeError, match=name):
            LocalServer(**{name: address})  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)):
        LocalServer(f"{address}:0").start()  # type: ignore[arg-type]
    for arguments in (["--host", address], ["--port", f"{address}:0"], [address]):
        done = subprocess.run(
            [sys.executable, "-m", "dstack_core.local", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")


def test_missing_extra_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r'pip install "dstack-core\[local\]"'):
        LocalServer().start()


def test_import_is_quiet_and_starts_nothing() -> None:
    code = (
        "import sys, threading, dstack_core.local as local\n"
        "assert threading.active_count() == 1\n"
        "assert not {'uvicorn', 'starlette', 'cryptography', 'paramiko'} & set(sys.modules)\n"
        "local.LocalServer()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_server_is_quiet() -> None:
    code = (
        "import logging, requests\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "logging.getLogger('urllib3').setLevel(logging.WARNING)\n"
        "from dstack_core.local import LocalServer\n"
        "with LocalServer() as server:\n"
        "    server.faults.add('runs/list', drop='before')\n"
        "    requests.get(server.url + '/healthcheck', timeout=5)\n"
        "    try: requests.post(server.url + '/api/runs/list', timeout=5)\n"
        "    except requests.ConnectionError: pass\n"
        "    requests.post(server.url + '/api/runs/list', timeout=5)\n"
        "    assert logging.getLogger('uvicorn.access').propagate\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    shown = [line for line in done.stderr.splitlines() if not line.startswith("INFO:uvicorn.error:")]
    assert shown == []


class Command:
    """A process of ``python -m dstack_core.local``, and a client of its server."""

    def __init__(self, process: subprocess.Popen[str], api: Api, directory: Path) -> None:
        self.process = process
        self.api = api
        self.directory = directory


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dstack_core.local", "--port", "0", "--project", "mine"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    text = first_words(process)
    found = dict(re.findall(r"export (\w+)=(\S+)", text))
    assert found["DSTACK_PROJECT"] == "mine"
    server = LocalServer(project="mine", token=found["DSTACK_TOKEN"])
    server._bound_port = int(found["DSTACK_SERVER_URL"].rpartition(":")[2])
    assert f"url: {server.url}" in text
    directory = next(tmp_path.glob("dstack-local-*"))
    yield Command(process, Api(server), directory)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_cleans_up_after_a_signal(command: Command, number: signal.Signals) -> None:
    pids = _horde(command.api)
    command.process.send_signal(number)
    assert command.process.wait(20) == 0
    assert [pid for pid in pids if alive(pid)] == []
    assert not command.directory.exists()


def test_a_killed_command_is_cleaned_up(command: Command) -> None:
    pids = _horde(command.api)
    command.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))
    wait_until(lambda: not command.directory.exists())


def test_fault_replaces_the_reply(make: Callable[..., Api]) -> None:
    api = make()
    api.server.faults.add("runs/apply", times=2, status=503, headers={"Retry-After": "1"}, body="busy")
    for _ in range(2):
        reply = api.call("{p}/runs/apply", {"plan": {"run_spec": task("f", "true")}, "force": False})
        assert (reply.status_code, reply.text, reply.headers["Retry-After"]) == (503, "busy", "1")
    assert api.ok("runs/list", {}) == []
    assert api.server.faults.pending == 0
    assert api.run("ff", "true")["status"] == "done"


def test_fault_may_hide_that_the_request_was_carried_out(make: Callable[..., Api]) -> None:
    api = make()
    api.server.faults.add("runs/apply", status=502, carry_out=True)
    reply = api.call("{p}/runs/apply", {"plan": {"run_spec": task("ff", "true")}, "force": False})
    assert (reply.status_code, reply.json()) == (502, {"detail": "injected fault"})
    assert api.wait("ff")["status"] == "done"


@pytest.mark.parametrize(("drop", "runs"), [("before", 0), ("after", 1)])
def test_fault_drops_the_connection(
    make: Callable[..., Api], drop: Literal["before", "after"], runs: int
) -> None:
    api = make()
    api.server.faults.add("runs/apply", drop=drop)
    with pytest.raises(requests.ConnectionError):
        api.call("{p}/runs/apply", {"plan": {"run_spec": task("ff", "true")}, "force": False})
    assert len(api.ok("runs/list", {})) == runs


def test_fault_delays(make: Callable[..., Api]) -> None:
    api = make()
    api.server.faults.add("runs/list", delay=0.3)
    start = time.monotonic()
    assert api.ok("runs/list", {}) == []
    assert time.monotonic() - start >= 0.3
    api.server.faults.add("runs/list", delay=600)
    with pytest.raises(requests.Timeout):
        api.session.post(f"{api.server.url}/api/runs/list", json={}, timeout=0.2)


def test_faults_are_used_in_order_and_checked(make: Callable[..., Api]) -> None:
    api = make()
    faults = api.server.faults
    faults.add("runs/list", times=None, status=500)
    faults.add("runs/list", status=501)
    assert [api.call("runs/list", {}).status_code for _ in range(3)] == [500, 500, 500]
    faults.clear()
    assert api.call("runs/list", {}).status_code == 200
    with pytest.raises(ValueError, match="expected a status, a drop or a delay"):
        faults.add("x")
    with pytest.raises(ValueError, match="expected a status or a drop, got both"):
        faults.add("x", status=500, drop="before")


def test_requests_are_recorded(make: Callable[..., Api]) -> None:
    api = make()
    before = time.monotonic()
    api.ok("runs/list", {})
    api.ok("server/get_info")
    recorded = api.server.requests
    assert [(one.method, one.path) for one in recorded] == [
        ("POST", "/api/runs/list"),
        ("POST", "/api/server/get_info"),
    ]
    assert before <= recorded[0].time <= recorded[1].time <= time.monotonic()


def test_client_knows_the_server(shared_server: LocalServer) -> None:
    client = shared_server.client()
    assert client is not shared_server.client()
    assert shared_server.token not in repr(client)
