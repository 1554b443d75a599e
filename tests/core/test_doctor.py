"""The examination of a connection: each fault that is planted is named, with what to do about it."""

from __future__ import annotations

import datetime
import importlib.util
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_core import Client, Task
from dstack_core.integration import Finding, doctor_network, examine
from dstack_core.integration import doctor as doctor_module
from dstack_core.local import LocalServer
from tests.core.scripted import recorded
from tests.ports import free_port
from tests.replaced import replace_in

Replies = dict[str, tuple[int, Any]]


def healthy() -> Replies:
    """Return the replies of a real server, by the end of the path."""
    run_plan = recorded("get_plan_minimal_0.22.5_no_fleet")
    offer = {
        "backend": "aws",
        "region": "eu-west-1",
        "price": 1.5,
        "availability": "available",
        "instance": {
            "name": "g5.xlarge",
            "resources": {"cpus": 4, "memory_mib": 16384, "gpus": [], "spot": False},
        },
    }
    run_plan["job_plans"][0] |= {"offers": [offer], "total_offers": 1, "max_price": 1.5}
    return {
        "server/get_info": (200, recorded("server_get_info_0.22.5")),
        "users/get_my_user": (200, recorded("users_get_my_user_0.22.5")),
        "projects/main/get": (200, recorded("projects_get_0.22.5")),
        "projects/list": (200, [recorded("projects_get_0.22.5")]),
        "runs/list": (200, []),
        "runs/get_plan": (200, run_plan),
    }


class Stub:
    """An HTTP server with fixed replies; ``date`` replaces its header, ``tls`` its plain connections."""

    def __init__(self, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.replies = healthy()
        self.date: str | None = None
        self.answering = threading.Event()
        self.answering.set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.answering.wait()
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = next(
                    (reply for path, reply in stub.replies.items() if self.path.endswith(path)), (404, {})
                )
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response_only(status)
                self.send_header("Date", stub.date or self.date_time_string())
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://{address}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.answering.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def make() -> Iterator[Callable[..., Stub]]:
    stubs: list[Stub] = []

    def start(**options: Any) -> Stub:
        stubs.append(Stub(**options))
        return stubs[-1]

    yield start
    for each in stubs:
        each.close()


@pytest.fixture
def stub(make: Callable[..., Stub]) -> Stub:
    return make()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DSTACK_SERVER_URL", "DSTACK_PROJECT", "DSTACK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def found(url: str | None = None, run_name: str | None = None, timeout: float = 10) -> list[Finding]:
    """Return what was found on the server at ``url``, or on the configured one."""

    def connect() -> Client:
        arguments = (
            {} if url is None else {"server_url": url, "project_name": "main", "user_token": "secret-token"}
        )
        return Client.from_config(**arguments, retry_budget=0, timeout=timeout)  # type: ignore[arg-type]

    findings = list(examine(connect, run_name=run_name))
    assert "secret-token" not in repr(findings)
    for each in findings:
        assert bool(each.advice) == (each.state in ("warning", "error")), each
    return findings


def problems(*arguments: Any, **options: Any) -> list[tuple[str, str]]:
    return [
        (each.state, each.check)
        for each in found(*arguments, **options)
        if each.state in ("warning", "error")
    ]


def text_of(findings: list[Finding], check: str) -> str:
    return " ".join(f"{each.text} {each.advice}" for each in findings if each.check == check)


def certificate(folder: Path, days: float) -> tuple[ssl.SSLContext, Path]:
    """Return a server's side of TLS for 127.0.0.1, and the file of the certificate, which signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dstack.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "cert.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = folder / "key.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, private)
    return context, path


def test_nothing_is_wrong(stub: Stub) -> None:
    findings = found(stub.url)
    assert [each.state for each in findings if each.state != "ok"] == ["skipped"]
    assert [each.check for each in findings] == [
        "installation", "configuration", "server", "version", "clocks", "token", "project", "machines", "SSH",
    ]  # fmt: skip
    assert "1 machine is on offer; the cheapest costs 1.50 USD per hour" in text_of(findings, "machines")


def test_httpx_is_missing(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "find_spec", lambda name: None)
    assert importlib.util.find_spec("httpx") is not None
    assert problems(stub.url) == [("warning", "installation")]


def test_nothing_is_configured() -> None:
    assert problems() == [("error", "configuration")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("projects: [", "expected YAML"),
        ("projects:\n- {name: main, url: localhost, token: secret-token, default: true}", "Add the scheme"),
        ("projects:\n- {name: main, url: 'http://x', default: true}", "expected a token"),
    ],
)
def test_the_configuration_is_wrong(home: Path, content: str, words: str) -> None:
    (home / ".dstack").mkdir()
    (home / ".dstack" / "config.yml").write_text(content)
    findings = found()
    assert [each.check for each in findings] == ["installation", "configuration"]
    assert words in text_of(findings, "configuration")


def test_others_can_read_the_configuration(home: Path, stub: Stub) -> None:
    (home / ".dstack").mkdir()
    path = home / ".dstack" / "config.yml"
    path.write_text(f"projects:\n- {{name: main, url: '{stub.url}', token: secret-token, default: true}}\n")
    path.chmod(0o644)
    findings = found()
    assert f"chmod 600 {path}" in text_of(findings, "config file")
    path.chmod(0o600)
    assert "config file" not in {each.check for each in found()}


def test_the_name_has_no_address() -> None:
    findings = found("http://no-such-host.invalid:3000")
    assert "no-such-host.invalid has no address here" in text_of(findings, "server")


def test_nothing_listens_on_the_port() -> None:
    findings = found(f"http://127.0.0.1:{free_port()}")
    assert "refused the connection" in text_of(findings, "server")


def test_the_packets_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(*_: Any, **__: Any) -> None:
        raise TimeoutError("timed out")

    url = f"http://127.0.0.1:{free_port()}"
    replace_in(monkeypatch, doctor_network, "socket", create_connection=dropped)
    assert "firewall" in text_of(found(url), "server")


def test_the_server_does_not_reply(stub: Stub) -> None:
    stub.answering.clear()
    findings = found(stub.url, timeout=0.5)
    assert "0.5 s" in text_of(findings, "server")
    assert "read its own log" in text_of(findings, "server")


def test_the_certificate_is_not_trusted(make: Callable[..., Stub], tmp_path: Path) -> None:
    context, _ = certificate(tmp_path, 90)
    findings = found(make(tls=context).url)
    assert "is not trusted here" in text_of(findings, "TLS")
    assert "CA bundle" in text_of(findings, "TLS")


@pytest.mark.parametrize(("days", "state"), [(5, "warning"), (90, "ok")])
def test_the_certificate_ends_soon(
    make: Callable[..., Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, state: str
) -> None:
    context, path = certificate(tmp_path, days)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    findings = found(make(tls=context).url)
    assert [each.state for each in findings if each.check == "TLS"] == [state]


def test_the_server_has_no_tls(stub: Stub) -> None:
    findings = found(stub.url.replace("http:", "https:"))
    assert "does not speak TLS" in text_of(findings, "TLS")
    assert stub.url in text_of(findings, "TLS")


def test_the_token_travels_as_plain_text(make: Callable[..., Stub]) -> None:
    # Any other address than those that ``localhost`` may have.
    assert problems(make(address="127.0.0.2").url) == [("warning", "TLS")]


@pytest.mark.parametrize("body", [b"<html>Welcome to nginx</html>", b"", {"hello": "world"}])
def test_the_server_is_not_dstack(stub: Stub, body: Any) -> None:
    stub.replies["server/get_info"] = (200, body)
    findings = found(stub.url)
    assert "not as a dstack server" in text_of(findings, "server")


@pytest.mark.parametrize("status", [404, 405])
def test_another_program_answers_that_it_has_no_such_page(stub: Stub, status: int) -> None:
    stub.replies["server/get_info"] = stub.replies["users/get_my_user"] = (status, b"<html>nothing</html>")
    findings = found(stub.url)
    assert "not as a dstack server" in text_of(findings, "server")
    assert "Check the address and the port" in findings[-1].advice


def test_the_server_fails(stub: Stub) -> None:
    stub.replies["server/get_info"] = (500, {"detail": "Internal Server Error"})
    findings = found(stub.url)
    assert "500" in text_of(findings, "server")
    assert "read its own log" in text_of(findings, "server")


def test_the_server_is_slow(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 3.5])
    monkeypatch.setattr(doctor_module, "_now", lambda: next(seconds))
    assert "took 3.5 s to answer" in text_of(found(stub.url), "server")


@pytest.mark.parametrize(
    ("version", "state"), [("0.18.43", "error"), ("0.23.0", "warning"), (None, "warning"), ("0.19.40", "ok")]
)
def test_the_version(stub: Stub, version: str | None, state: str) -> None:
    stub.replies["server/get_info"] = (200, {"server_version": version})
    assert [each.state for each in found(stub.url) if each.check == "version"] == [state]


@pytest.mark.parametrize(("seconds", "word"), [(120, "ahead of"), (-3600, "behind")])
def test_the_clocks_differ(stub: Stub, seconds: float, word: str) -> None:
    handler = BaseHTTPRequestHandler.date_time_string
    stub.date = handler(None, time.time() + seconds)  # type: ignore[arg-type]
    assert word in text_of(found(stub.url), "clocks")
    stub.date = "not a date"
    assert "clocks" not in {each.check for each in found(stub.url)}


def test_the_token_is_wrong(stub: Stub) -> None:
    stub.replies["users/get_my_user"] = (403, recorded("error_403_bad_token_0.22.5"))
    findings = found(stub.url)
    assert findings[-1].check == "token"
    assert "Copy the token again" in findings[-1].advice


def test_the_project_does_not_exist(stub: Stub) -> None:
    stub.replies["projects/main/get"] = (404, recorded("error_404_project_0.22.5"))
    findings = found(stub.url)
    assert findings[-1].check == "project"
    assert "The projects of this token: main" in findings[-1].advice


def test_the_user_is_not_a_member(stub: Stub) -> None:
    stub.replies["projects/main/get"] = (403, recorded("error_403_non_member_0.22.5"))
    findings = found(stub.url)
    assert "not a member of project main" in findings[-1].text


def test_no_machine_is_on_offer(stub: Stub) -> None:
    stub.replies["runs/get_plan"] = (200, recorded("get_plan_minimal_0.22.5_no_fleet"))
    findings = found(stub.url)
    assert "No machine is on offer" in text_of(findings, "machines")
    assert "fleet" in text_of(findings, "machines")


def test_the_ssh_key_is_open_to_others(home: Path, stub: Stub) -> None:
    folder = home / ".dstack" / "ssh"
    folder.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    path = folder / "id_rsa"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o644)
    assert problems(stub.url) == [("warning", "SSH key")]
    path.chmod(0o600)
    assert problems(stub.url) == []
    path.write_text("not a key")
    assert problems(stub.url) == [("error", "SSH key")]


def test_a_container_is_logged_in_to(tmp_path: Path) -> None:
    with LocalServer(step_seconds=0.01) as server:

        def connect() -> Client:
            return Client(server_url=server.url, project_name="main", user_token=server.token, retry_budget=0)

        def ssh(name: str | None) -> Finding:
            return next(each for each in examine(connect, run_name=name) if each.check == "SSH")

        assert ssh(None).state == "skipped"
        assert ssh("missing").state == "error"
        with connect() as client:
            run = client.runs.submit(Task(commands=["sleep 300"]), "doctor")
            events = run.follow(poll_interval=0.05)
            while run.last_status != "running":
                next(events)
            assert ssh(None).state == ssh("doctor").state == "ok"
            run.stop(abort=True, until="ended", timeout=30)
            assert ssh("doctor").state == "skipped"
        other = tmp_path / "other"
        key = ec.generate_private_key(ec.SECP256R1())
        other.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        arguments: dict[str, Any] = {
            "server_url": server.url,
            "project_name": "main",
            "user_token": server.token,
        }
        with Client.from_config(ssh_identity_file=other, **arguments) as client:
            run = client.runs.submit(Task(commands=["sleep 300"]), "of-another")
            events = run.follow(poll_interval=0.05)
            while run.last_status != "running":
                next(events)
            # The run of another user may be the newest one; only a run that was named is an error.
            assert ssh(None).state == "warning"
            assert ssh("of-another").state == "error"
            run.stop(abort=True, until="ended", timeout=30)
