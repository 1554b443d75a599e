"""A client without the packages of the extra ``attach``: what works, and what names the extra before it costs."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import dstack_core as dstack
from dstack_core._attach import key_text
from dstack_core._attach.ports import bind
from dstack_core._code.credentials import GitCredentials
from dstack_core._code.remote import SshHost
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.errors import ConfigurationError, PortInUseError
from dstack_core.integration.doctor import examine
from dstack_core.local import LocalServer
from dstack_core.models.options import SubmitOptions
from tests.core.scripted import MISSING, Driver, Script, recorded, reply, run_json

PEM, FORMS = serialization.Encoding.PEM, serialization.PrivateFormat
OPEN, LOCKED = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"passphrase")
INSTALL = r'pip install "dstack-core\[attach\]"'
KEYS: dict[str, Any] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "ecdsa": ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}


def text_of(kind: str, form: Any = FORMS.OpenSSH, lock: Any = OPEN) -> bytes:
    text: bytes = KEYS[kind].private_bytes(PEM, form, lock)
    return text


def public_half(kind: str) -> str:
    public = KEYS[kind].public_key()
    text: bytes = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text.decode()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the packages away."""
    for name in ("paramiko", "cryptography", "websockets", "psutil"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("kind", "form", "shows_public_half"),
    [
        ("rsa", FORMS.OpenSSH, True),
        ("rsa", FORMS.TraditionalOpenSSL, True),
        ("rsa", FORMS.PKCS8, False),
        ("ecdsa", FORMS.OpenSSH, True),
        ("ecdsa", FORMS.TraditionalOpenSSL, False),
        ("ed25519", FORMS.OpenSSH, True),
        ("ed25519", FORMS.PKCS8, False),
    ],
)
def test_the_public_half_is_read_where_the_text_shows_it(
    kind: str, form: Any, shows_public_half: bool
) -> None:
    assert key_text.public_half(text_of(kind, form)) == (public_half(kind) if shows_public_half else None)


@pytest.mark.parametrize(
    ("kind", "form"), [("rsa", FORMS.OpenSSH), ("rsa", FORMS.TraditionalOpenSSL), ("ed25519", FORMS.PKCS8)]
)
def test_an_encrypted_key_is_recognized_by_its_text(kind: str, form: Any) -> None:
    with pytest.raises(key_text.EncryptedKeyError, match="ssh-keygen -p"):
        key_text.check_key_text(text_of(kind, form, LOCKED))


@pytest.mark.parametrize("cut", [0, 10, 40, 60, 80, 120])
def test_what_is_not_a_key_is_refused_wherever_it_ends(cut: int) -> None:
    whole = text_of("rsa", FORMS.TraditionalOpenSSL)
    end = b"\n-----END RSA PRIVATE KEY-----\n"
    with pytest.raises(ValueError, match="expected a private SSH key"):
        key_text.public_half(whole[:cut] + end)


def target_of(server: LocalServer) -> dict[str, Any]:
    return {"server_url": server.url, "project_name": server.project, "user_token": server.token}


def submission(session: Operations, **options: Any) -> Any:
    given = SubmitOptions(**options)  # type: ignore[typeddict-item]
    task = dstack.Task(commands=["true"])
    return session.submit(task, "train", given, verify_ports=True, marker="mine", retry_budget=None)


def old_server() -> Script:
    user = recorded("users_get_my_user_0.18.44")
    return Script(
        users__get_my_user=[reply(user)], runs__get=[MISSING], runs__apply=[reply(run_json("submitted"))]
    )


@pytest.mark.usefixtures("plain")
def test_a_server_that_keeps_no_key_gets_the_public_half_of_the_file(driver: Driver) -> None:
    own = Path.home() / ".dstack" / "ssh" / "id_rsa"
    own.parent.mkdir(parents=True)
    own.write_bytes(text_of("rsa", FORMS.TraditionalOpenSSL))
    script = old_server()
    driver.run(submission(Operations(Api("http://s", "main"), 30), debug_on_failure="30m"), script)
    sent = script.bodies("runs/apply")[0]["plan"]["run_spec"]["ssh_key_pub"]
    assert sent == public_half("rsa") + " dstack-core"


@pytest.mark.usefixtures("plain")
def test_without_a_file_it_gets_a_key_without_a_private_half_and_a_warning_names_the_extra(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    script = old_server()
    with caplog.at_level(logging.WARNING, logger="dstack_core"):
        driver.run(submission(Operations(Api("http://s", "main"), 30)), script)
    sent = script.bodies("runs/apply")[0]["plan"]["run_spec"]["ssh_key_pub"]
    assert serialization.load_ssh_public_key(sent.encode())
    (record,) = caplog.records
    assert 'pip install "dstack-core[attach]"' in record.getMessage()
    assert not (Path.home() / ".dstack").exists()


@pytest.mark.usefixtures("plain")
def test_a_hold_that_no_key_could_enter_is_refused_before_the_submit(driver: Driver) -> None:
    script = old_server()
    flow = submission(Operations(Api("http://s", "main"), 30), debug_on_failure="30m")
    with pytest.raises(ConfigurationError, match=rf"^debug_on_failure: .*{INSTALL}, or use a server"):
        driver.run(flow, script)
    assert not script.bodies("runs/apply")


@pytest.mark.usefixtures("plain")
def test_a_key_file_needs_the_extra(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(text_of("ed25519"))
    with pytest.raises(ConfigurationError, match=rf"^ssh_identity_file: .*{INSTALL}"):
        dstack.Client.from_config(
            project_name="main", server_url="http://s", user_token="t", ssh_identity_file=path
        )


@pytest.mark.usefixtures("plain")
def test_a_key_to_clone_with_needs_no_extra() -> None:
    text = text_of("ed25519").decode()
    assert GitCredentials.checked(git_private_key=text).read_key() == text
    locked = text_of("rsa", FORMS.OpenSSH, LOCKED).decode()
    with pytest.raises(ConfigurationError, match="expected a key without a passphrase"):
        GitCredentials.checked(git_private_key=locked).read_key()
    with pytest.raises(ConfigurationError, match="expected a private SSH key"):
        GitCredentials.checked(
            git_private_key="-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----"
        ).read_key()


@pytest.mark.usefixtures("plain")
def test_an_alias_of_the_ssh_configuration_is_kept_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = Path.home() / ".ssh" / "config"
    config.parent.mkdir()
    config.write_text("Host *\n  User other\nHost work\n  HostName git.example.com\n")
    assert SshHost.configured("github.com") == SshHost()
    assert not caplog.records
    assert SshHost.configured("work") == SshHost()
    assert 'pip install "dstack-core[attach]"' in caplog.text


def test_submit_follow_and_results_work_and_attaching_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with LocalServer() as server:
        target = target_of(server)
        # The server has made its keys.
        with dstack.Client(**target) as client:
            client.user()
        for name in ("paramiko", "cryptography", "websockets", "psutil"):
            monkeypatch.setitem(sys.modules, name, None)
        with dstack.Client(**target) as client:
            task = dstack.Task(commands=["echo hello"])
            run = client.runs.submit(task, debug_on_failure="1m")
            assert run.wait(poll_interval=0.1).succeeded
            assert b"".join(run.logs()).split() == [b"hello"]
            with pytest.raises(ConfigurationError, match=rf"^attach: .*{INSTALL}$"):
                run.attach()
            before = len(client.runs.list(all=True))
            task = dstack.Task(commands=["true"], ports=["18080:80"])
            with pytest.raises(ConfigurationError, match=rf"^ports: .*{INSTALL}, or pass verify_ports=False"):
                client.runs.submit(task)
            assert len(client.runs.list(all=True)) == before
            assert client.runs.submit(task, verify_ports=False).wait(poll_interval=0.1).succeeded


def test_the_async_client_names_the_extra_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def attach(server: LocalServer) -> None:
        target = target_of(server)
        async with dstack.AsyncClient(**target) as client:
            await client.user()
            for name in ("paramiko", "cryptography", "websockets", "psutil"):
                monkeypatch.setitem(sys.modules, name, None)
            run = await client.runs.submit(dstack.Task(commands=["echo hello"]))
            with pytest.raises(ConfigurationError, match=rf"^attach: .*{INSTALL}$"):
                await run.attach()
            assert (await run.wait(poll_interval=0.1)).succeeded

    with LocalServer() as server:
        asyncio.run(attach(server))


def test_a_taken_port_is_reported_without_its_owner(plain: None) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(PortInUseError, match=INSTALL) as caught,
    ):
        bind(taken.getsockname()[1], 80)
    assert caught.value.pid is None


def test_the_examination_names_the_extra(plain: None) -> None:
    with LocalServer() as server:
        target = target_of(server)
        found = [each for each in examine(lambda: dstack.Client(**target)) if "attach]" in each.text]
    assert [(each.check, each.state) for each in found] == [("installation", "skipped"), ("SSH", "skipped")]


def test_the_async_client_without_httpx_names_its_extra() -> None:
    script = "import sys; sys.modules['httpx'] = None; import dstack_core; dstack_core.AsyncClient"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert 'pip install "dstack-core[async]"' in done.stderr
