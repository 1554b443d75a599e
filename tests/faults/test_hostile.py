"""A hostile or broken server cannot make a caller wait without limit, and learns no secret."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import dstack_core as dstack
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.local import LocalServer
from dstack_core.models.progress import Progress
from tests.core.scripted import Driver, Script, page, reply, run_json

TOKEN = "the-secret-token"


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


def session(driver: Driver) -> Operations:
    return Operations(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def test_reports_a_log_of_endless_empty_pages(driver: Driver) -> None:
    script = Script(runs__get=[reply(run_json("running"))], logs__poll=[page(next_token="9")])
    flow = session(driver).follow(Progress("train", "id-1"), poll_interval=5, logs=True, retry_budget=60)
    with pytest.raises(dstack.ProtocolError, match="has no end"):
        driver.events(flow, script)


def test_reports_a_list_that_repeats_itself(driver: Driver) -> None:
    runs = [run_json("done", run_id=f"id-{number}") for number in range(100)]
    with pytest.raises(dstack.ProtocolError, match="again and again"):
        driver.run(session(driver).list_runs(all=True), Script(runs__list=[reply(runs)]))


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                answer(self)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def get(kind: str, **arguments: Any) -> Any:
    if kind == "sync":
        with dstack.Client(project_name="main", user_token=TOKEN, **arguments) as client:
            return client.runs.get("train")
    import asyncio

    async def go() -> Any:
        async with dstack.AsyncClient(project_name="main", user_token=TOKEN, **arguments) as client:
            return await client.runs.get("train")

    return asyncio.run(go())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reply_sent_byte_by_byte_times_out(kind: str) -> None:
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")

    with serving(drip) as url:
        began = time.monotonic()
        with pytest.raises(dstack.ServerUnreachableError, match=r"no complete reply within 0.8 s"):
            get(kind, server_url=url, timeout=0.2, retry_budget=0.0)
        assert time.monotonic() - began < 30
        over.set()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reply_without_end_does_not_fill_the_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._transport.settings.LARGEST_REPLY", 1_000_000)

    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 100_000)

    with serving(flood) as url, pytest.raises(dstack.ProtocolError, match="no dstack server sends"):
        get(kind, server_url=url, retry_budget=0.0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a self-signed certificate for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's own authority")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    bundle, private = folder / "ca.pem", folder / "key.pem"
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return bundle, private


@pytest.fixture
def tls_server(certificates: tuple[Path, Path]) -> Iterator[str]:
    def not_found(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        body = b'{"detail": [{"msg": "Run not found", "code": "resource_not_exists"}]}'
        handler.send_response(400)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            not_found(self)

        def log_message(self, *_: object) -> None:
            return

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_refuses_an_unknown_certificate_unless_its_authority_is_given(
    tls_server: str, certificates: tuple[Path, Path], kind: str
) -> None:
    with pytest.raises(dstack.ServerUnreachableError, match=r"(?i)certificate") as failure:
        get(kind, server_url=tls_server, retry_budget=0.0)
    assert TOKEN not in str(failure.value)
    assert get(kind, server_url=tls_server, retry_budget=0.0, verify=str(certificates[0])) is None
    assert get(kind, server_url=tls_server, retry_budget=0.0, verify=False) is None


def test_the_embedded_server_requires_its_token(server: LocalServer) -> None:
    assert requests.post(f"{server.url}/api/projects/list", timeout=10).status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    for path in (
        "runs/get",
        "runs/apply",
        "runs/stop",
        "runs/delete",
        "logs/poll",
        "repos/get",
        "runs/get_plan",
    ):
        url = f"{server.url}/api/project/{server.project}/{path}"
        assert requests.post(url, json={}, timeout=10).status_code == 401, path
        assert requests.post(url, json={}, headers=wrong, timeout=10).status_code == 403, path


def test_the_embedded_server_listens_on_this_machine_alone(server: LocalServer) -> None:
    port = int(server.url.rpartition(":")[2])
    bound = {
        found.laddr.ip
        for found in psutil.Process().net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    }
    assert bound == {"127.0.0.1"}


def test_the_token_is_in_no_process_list(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["sleep 60"]})
        for _ in run.follow(poll_interval=0.02, logs=False):
            if run.status() is dstack.RunStatus.RUNNING:
                break
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        assert len(family) > 1
        assert not [one for one in family if server.token in " ".join(one.cmdline())]
        run.stop(abort=True)
        run.wait(30, poll_interval=0.05)


def test_no_repr_contains_the_secrets_of_a_run(server: LocalServer) -> None:
    secret = "the-secret-value"
    task = dstack.Task(commands=["true"], image="x", env={"KEY": secret}, registry_auth={"username": "me", "password": secret})  # type: ignore[arg-type]  # fmt: skip
    with server.client() as client:
        run = client.runs.submit(task)
        events = list(run.follow(poll_interval=0.02))
        shown = [task, client, run, run._snapshot, *events, run.outcome(), client.runs.plan(task)]
    assert not [one for one in shown if secret in repr(one) or server.token in repr(one)]


def test_reports_a_run_deleted_while_it_is_followed(driver: Driver) -> None:
    polls: list[Any] = [
        reply(run_json("running")),
        reply({"detail": [{"code": "resource_not_exists", "msg": "x"}]}, 400),
    ]
    flow = session(driver).follow(Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=60)
    with pytest.raises(dstack.RunNotFoundError, match="it was deleted"):
        driver.events(flow, Script(runs__get=polls))


def test_a_token_revoked_in_the_middle_ends_at_once(driver: Driver) -> None:
    revoked = reply({"detail": {"msg": "Invalid token", "code": None}}, 403)
    script = Script(runs__get=[reply(run_json("running")), revoked])
    flow = session(driver).follow(Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=600)
    with pytest.raises(dstack.AuthenticationError, match="refused the token"):
        driver.events(flow, script)
    assert driver.clock.slept == [5]


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_a_clock_that_is_ten_minutes_off_costs_no_line(driver: Driver, skew: float) -> None:
    ours = session(driver)
    ours.wall_clock = lambda: driver.clock() + skew
    script = Script(
        runs__get=[reply(run_json("running")), reply(run_json("done"))],
        logs__poll=[page((1, "a\n")), page((1, "a\n"), (2, "b\n"))],
    )
    events = driver.events(
        ours.follow(Progress("train", "id-1"), poll_interval=5, logs=True, retry_budget=60), script
    )
    assert [line for event in events if isinstance(event, dstack.LogLines) for line in event.lines] == [
        "a",
        "b",
    ]


def test_lines_of_any_kind_arrive(server: LocalServer) -> None:
    script = (
        "import os; w = lambda data: os.write(1, data);"
        "[w(b'x' * 65536) for _ in range(16)]; w(b'\\n');"
        "w(b'nul\\x00 ansi\\x1b[31m broken\\xff\\xfe\\n'); w(b'no end')"
    )
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": [f'python3 -c "{script}"']})
        lines = [
            line
            for event in run.follow(poll_interval=0.02)
            if isinstance(event, dstack.LogLines)
            for line in event.lines
        ]
    assert sum(line.count("x") for line in lines if set(line) == {"x"}) == 1024 * 1024
    assert lines[-2].startswith("nul\x00 ansi")
    assert lines[-2].endswith("broken\ufffd\ufffd")
    assert lines[-1] == "no end"
