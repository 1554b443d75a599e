"""The transports and clients over real sockets, with faults injected."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

import dstack_core as dstack
from dstack_core._transport import asynchronous, blocking, settings
from dstack_core.local import LocalServer


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture
def server(shared_server: LocalServer) -> Iterator[LocalServer]:
    yield shared_server
    shared_server.faults.clear()


class Calls:
    """Calls of the sync or the async client with the same arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def submit(self, arguments: dict[str, Any], **parameters: Any) -> Any:
        if self.kind == "sync":
            with dstack.Client(**arguments) as client:
                return client.runs.submit(**parameters)

        async def go() -> Any:
            async with dstack.AsyncClient(**arguments) as client:
                return await client.runs.submit(**parameters)

        return asyncio.run(go())


@pytest.fixture(params=["sync", "async"])
def calls(request: pytest.FixtureRequest) -> Calls:
    return Calls(request.param)


def target(server: LocalServer, **more: Any) -> dict[str, Any]:
    return {"server_url": server.url, "project_name": server.project, "user_token": server.token} | more


def applies(server: LocalServer) -> int:
    return sum("runs/apply" in path for _, path, *_ in server.requests)


@pytest.mark.parametrize(
    "fault",
    [{"drop": "before"}, {"drop": "after"}, {"status": 503}, {"status": 500}, {"status": 429}],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_a_fault_at_apply_results_in_exactly_one_run(
    server: LocalServer, calls: Calls, fault: dict[str, Any]
) -> None:
    with dstack.Client(**target(server)) as client:
        before = len(client.runs.list(all=True))
        server.faults.add(path="runs/apply", times=1, **fault)
        run = calls.submit(target(server), configuration={"type": "task", "commands": ["echo x"]})
        after = client.runs.list(all=True)
    assert len(after) == before + 1
    assert after[0].id == run.id


@pytest.mark.parametrize("path", ["users/get_my_user", "runs/get"])
def test_a_fault_before_apply_is_retried(server: LocalServer, calls: Calls, path: str) -> None:
    server.faults.add(path=path, times=1, drop="before")
    server.faults.add(path=path, times=1, status=503)
    # With a marker of the caller the run is requested first.
    task = {"type": "task", "commands": ["echo x"]}
    assert calls.submit(target(server), configuration=task, marker="ours").name


def test_a_reply_that_never_arrives_ends_with_the_timeout(server: LocalServer, calls: Calls) -> None:
    server.faults.add(path="runs/get", times=1, delay=30)
    task = {"type": "task", "commands": ["echo x"]}
    assert calls.submit(target(server, timeout=0.5), configuration=task, marker="ours").name


def test_the_error_for_a_missing_reply_has_a_rounded_number(server: LocalServer, calls: Calls) -> None:
    """Round the limit: it is what remains of a caller's time, and a library's own message shows a dozen digits."""
    server.faults.add(path="runs/get", times=None, delay=30)
    with pytest.raises(dstack.ServerUnreachableError) as raised:
        calls.submit(
            target(server, timeout=0.5123456, retry_budget=0.1),
            configuration={"type": "task", "commands": ["echo x"]},
            marker="ours",
        )
    # The async transport has one timer for the connect and the head of the reply.
    within = {"sync": "0.5", "async": "2"}[calls.kind]
    assert f": no reply within {within} s. Tried " in raised.value.message


def test_an_unreachable_server_is_an_error_after_the_budget(calls: Calls) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        arguments = {"server_url": url, "project_name": "main", "user_token": "t", "retry_budget": 1.0}
        with pytest.raises(
            dstack.ServerUnreachableError,
            match=rf"{url} \(project main, run \S+\): no answer: .*(refused|failed).*retry budget 1 s",
        ):
            calls.submit(arguments, run_name="lost", configuration={"type": "task", "commands": ["echo x"]})


def test_bad_input_sends_nothing(server: LocalServer, calls: Calls) -> None:
    before = len(server.requests)
    for parameters in ({"max_price": -1}, {"run_name": "No"}, {"spot_policy": "x"}):
        with pytest.raises(dstack.ConfigurationError):
            calls.submit(target(server), configuration={"type": "task", "commands": ["x"]}, **parameters)
    assert len(server.requests) == before


class _OtherService(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>It works!</html>")

    def log_message(self, *_: object) -> None:
        pass


def test_another_kind_of_server_is_a_protocol_error(calls: Calls) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _OtherService) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(dstack.ProtocolError, match="Is this the address of a dstack server"):
            calls.submit(
                {"server_url": url, "project_name": "main", "user_token": "t"},
                configuration={"type": "task", "commands": ["x"]},
            )
        other.shutdown()


def test_a_netrc_entry_does_not_replace_the_token(server: LocalServer) -> None:
    netrc = Path.home() / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password wrong\n")
    netrc.chmod(0o600)
    with dstack.Client(**target(server)) as client:
        assert client.runs.get("nope") is None


def test_one_client_serves_many_threads(server: LocalServer) -> None:
    with dstack.Client(**target(server)) as client, ThreadPoolExecutor(8) as pool:
        tasks = [{"type": "task", "commands": [f"echo {number}"]} for number in range(8)]
        runs = list(pool.map(client.runs.submit, tasks))
        outcomes = list(pool.map(lambda run: run.wait(30, poll_interval=0.1), runs))
    assert len({run.id for run in runs}) == 8
    assert all(outcome.succeeded for outcome in outcomes)


def test_leaving_a_follow_early_does_not_stop_the_run(server: LocalServer) -> None:
    with dstack.Client(**target(server)) as client:
        run = client.runs.submit({"type": "task", "commands": ["sleep 60"]})
        for _ in run.follow(poll_interval=0.1):
            break
        assert not run.status().is_finished
        run.stop(abort=True)
        assert run.wait(30, poll_interval=0.1).status == dstack.RunStatus.ABORTED


def test_an_unreachable_server_is_logged_without_the_token(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.add(path="users/get_my_user", times=2, status=503)
    with caplog.at_level(logging.INFO, "dstack_core"), dstack.Client(**target(server)) as client:
        client.runs.submit({"type": "task", "commands": ["echo x"]})
    assert "answered 503" in caplog.text
    assert "answers again" in caplog.text
    assert server.token not in caplog.text


def test_a_refused_repo_is_not_reported_as_too_big(server: LocalServer, tmp_path: Path) -> None:
    refusal = {"detail": [{"msg": "No repos here", "code": "error"}]}
    server.faults.add(path="repos/init", status=400, body=refusal)
    with (
        dstack.Client.from_config(tmp_path, **target(server)) as client,
        pytest.raises(dstack.RequestRejectedError, match="No repos here"),
    ):
        client.runs.submit({"type": "task", "commands": ["echo x"]})


def test_the_page_of_a_run_on_the_embedded_server(server: LocalServer) -> None:
    with dstack.Client(**target(server)) as client:
        run = client.runs.submit({"type": "task", "commands": ["echo x"], "env": {"KEY": "s3cr3t"}})
        assert run.wait(30, poll_interval=0.1).succeeded
    page = requests.get(run.url, timeout=10)
    assert page.ok
    assert f"Run {run.name} " in page.text
    assert "status: done" in page.text
    assert "s3cr3t" not in page.text
    assert requests.get(run.url + "0", timeout=10).status_code == 404


def test_a_client_that_is_closed_can_be_closed_again(server: LocalServer) -> None:
    client = dstack.Client(**target(server))
    client.runs.list()
    client.close()
    client.close()


@pytest.fixture
def connections() -> Iterator[tuple[str, list[Any]]]:
    """Yield the address of a server that keeps connections open, and the connections of its requests."""
    found: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            found.append(self.client_address)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()


@pytest.mark.parametrize(("idle", "is_used_again"), [(60.0, True), (0.0, False)], ids=["in use", "idle"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_connection_that_was_idle_is_not_used_again(
    connections: tuple[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    idle: float,
    is_used_again: bool,
) -> None:
    url, found = connections
    arguments: Any = {"server_url": url, "project_name": "main", "user_token": "token"}
    module = blocking if kind == "sync" else asynchronous
    monkeypatch.setattr(module, "IDLE_SECONDS", idle)
    if kind == "sync":
        with dstack.Client(**arguments) as client:
            assert [client.projects.list() for _ in range(3)] == [[]] * 3
    else:

        async def lists() -> list[Any]:
            async with dstack.AsyncClient(**arguments) as client:
                return [await client.projects.list() for _ in range(3)]

        assert asyncio.run(lists()) == [[]] * 3
    assert len(found) >= 3
    assert len(set(found)) == (1 if is_used_again else len(found))


def test_a_connection_is_given_up_before_uvicorn_closes_it() -> None:
    default = inspect.signature(uvicorn.Config).parameters["timeout_keep_alive"].default
    assert default - 1.0 >= settings.IDLE_SECONDS
