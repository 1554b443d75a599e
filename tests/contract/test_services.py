"""Services: the address, the wait until it answers, and requests through it, on both servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

import dstack_core as dstack
from dstack_core import RunStatus
from tests.contract.conftest import Target
from tests.ports import free_port

SECONDS = 30


def serve(port: int) -> str:
    return f"exec python3 -u -m http.server {port} --bind 127.0.0.1"


def service(target: Target, *commands: str, port: int | None = None, **more: Any) -> dict[str, Any]:
    port = port or free_port()
    commands = commands or ("mkdir -p site && cd site", "echo hello > greeting", serve(port))
    return target.task(*commands) | {"type": "service", "port": port} | more


@contextmanager
def running(target: Target, client: dstack.Client, configuration: dict[str, Any]) -> Iterator[dstack.Run]:
    run = client.runs.submit(configuration)
    try:
        yield run
    finally:
        run.stop()
        assert run.wait(target.timeout, poll_interval=target.poll_interval)


@pytest.mark.parametrize("auth", [True, False])
def test_requests_reach_the_service_through_its_address(
    target: Target, client: dstack.Client, auth: bool
) -> None:
    with running(target, client, service(target, auth=auth)) as run:
        url = run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
        assert url == run.service_url == f"{target.url}/proxy/services/{target.project}/{run.name}/"
        assert run.service_model is None
        member = {"Authorization": f"Bearer {target.token}"}
        answer = requests.get(f"{url}greeting?a=b", headers=member, timeout=SECONDS)
        assert (answer.status_code, answer.text) == (200, "hello\n")
        assert requests.get(f"{url}nothing-here", headers=member, timeout=SECONDS).status_code == 404
        assert requests.post(url, data=b"x", headers=member, timeout=SECONDS).status_code == 501
        head = requests.head(f"{url}greeting", headers=member, timeout=SECONDS)
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "6", b"")
        slashless = requests.get(url.rstrip("/"), headers=member, timeout=SECONDS, allow_redirects=False)
        assert (slashless.status_code, slashless.headers["location"]) == (308, url)
        stranger = requests.get(f"{url}greeting", timeout=SECONDS)
        assert stranger.status_code == (403 if auth else 200)
        if auth:
            reason = f"Unauthenticated or unauthorized to access project {target.project}"
            assert stranger.json() == {"detail": reason}
    assert run.status() is RunStatus.TERMINATED
    gone = requests.get(url, headers=member, timeout=SECONDS)
    assert (gone.status_code, gone.json()) == (
        404,
        {"detail": f"Service {target.project}/{run.name} not found"},
    )


ECHO = """
import http.server, json, sys
class Echo(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
        received = {"path": self.path, "body": body, "x": self.headers["x-asked"]}
        self.send_response(201)
        self.send_header("x-received", "yes")
        self.send_header("set-cookie", "a=1")
        self.send_header("set-cookie", "b=2")
        self.end_headers()
        self.wfile.write(json.dumps(received).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
"""


@pytest.mark.parametrize("strip_prefix", [True, False])
def test_path_query_headers_and_body_are_passed_both_ways(
    target: Target, client: dstack.Client, strip_prefix: bool
) -> None:
    port = free_port()
    command = f"exec python3 -u -c '{ECHO}' {port}"
    configuration = service(target, command, port=port, auth=False, strip_prefix=strip_prefix)
    with running(target, client, configuration) as run:
        url = run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
        answer = requests.post(f"{url}a/b%2Fc?d=%20e", data="grüße".encode(), headers={"x-asked": "it"}, timeout=SECONDS)  # fmt: skip
    assert (answer.status_code, answer.headers["x-received"]) == (201, "yes")
    assert answer.headers["set-cookie"] == "a=1, b=2", "repeated headers become one"
    received = answer.json()
    assert (received["body"], received["x"]) == ("grüße", "it")
    prefix = "/" if strip_prefix else f"/proxy/services/{target.project}/{run.name}/"
    assert received["path"].startswith(prefix + "a/b")
    assert received["path"].endswith("?d=%20e")


def test_a_service_that_does_not_answer_yet_is_waited_for(target: Target, client: dstack.Client) -> None:
    port = free_port()
    with running(target, client, service(target, "echo up; sleep 600", port=port, auth=False)) as run:
        with pytest.raises(
            dstack.WaitTimeoutError, match=f"{run.name} was not ready after 6 s. It keeps running"
        ):
            run.wait_until_ready(6, poll_interval=target.poll_interval)
        assert requests.get(run.service_url or "", timeout=SECONDS).status_code in (404, 502)


def test_a_service_that_ends_before_it_answers_raises_its_own_error(
    target: Target, client: dstack.Client
) -> None:
    run = client.runs.submit(service(target, "exit 3"))
    with pytest.raises(dstack.RunFailedError, match=f"Run {run.name} failed: its command exited") as caught:
        run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
    assert caught.value.outcome.exit_status == target.reported_exit_status(3)


def test_a_task_is_not_a_service(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("echo hello"))
    assert (run.service_url, run.service_model, run.service_model_url) == (None, None, None)
    with pytest.raises(dstack.ConfigurationError, match="expected a service, got one without an address"):
        run.wait_until_ready(target.timeout)
    run.wait(target.timeout, poll_interval=target.poll_interval)


def test_the_model_of_a_service_can_be_read(target: Target, client: dstack.Client) -> None:
    with running(target, client, service(target, "sleep 600", model="llama")) as run:
        assert run.service_model == "llama"
        assert (run.service_model_url or "").startswith(f"{target.url}/proxy/")


def test_the_async_twin_waits_too(target: Target) -> None:
    async def go() -> tuple[str, str | None]:
        async with target.async_client() as client:
            run = await client.runs.submit(service(target))
            url = await run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
            await run.stop()
            await run.wait(target.timeout, poll_interval=target.poll_interval)
            return url, run.service_url

    url, received = asyncio.run(go())
    assert url == received
