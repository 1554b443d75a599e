"""The keys a run is submitted with and logged in to."""

from __future__ import annotations

import logging
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

import dstack_core as dstack
from dstack_core._attach.keys import LoginKeys, describe, read_identity_file
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.errors import AttachError, ConfigurationError
from dstack_core.models.options import SubmitOptions
from tests.core.scripted import MISSING, Driver, Script, recorded, reply, run_json

PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
PKCS1, PKCS8 = serialization.PrivateFormat.TraditionalOpenSSL, serialization.PrivateFormat.PKCS8
OPEN = serialization.NoEncryption()
LOCKED = serialization.BestAvailableEncryption(b"passphrase")
MAKERS: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ecdsa": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def public_line(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return text.decode()


def written(folder: Path, key: Any, form: Any = OPENSSH, lock: Any = OPEN, name: str = "key") -> Path:
    path = folder / name
    path.write_bytes(key.private_bytes(PEM, form, lock))
    return path


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("rsa", OPENSSH),
        ("rsa", PKCS1),
        ("rsa", PKCS8),
        ("ecdsa", OPENSSH),
        ("ecdsa", PKCS1),
        ("ecdsa", PKCS8),
        ("ed25519", OPENSSH),
        ("ed25519", PKCS8),
    ],
)
def test_every_format_of_every_key_type_is_read(tmp_path: Path, kind: str, form: Any) -> None:
    key = MAKERS[kind]()
    found = read_identity_file(written(tmp_path, key, form))
    assert found.is_for(public_line(key) + " somebody@somewhere")
    assert found.public_line.split()[:2] == public_line(key).split()


def test_an_unusable_key_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    key = MAKERS["ed25519"]()
    short = tmp_path / "text"
    short.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n")
    cases = [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "Is a directory"),
        (written(tmp_path, key, OPENSSH, LOCKED, "locked"), "encrypted.*ssh-keygen -p"),
        (written(tmp_path, key, PKCS8, LOCKED, "locked8"), "encrypted.*ssh-keygen -p"),
        (short, "expected a private SSH key"),
        (
            written(tmp_path, ed448.Ed448PrivateKey.generate(), PKCS8, OPEN, "ed448"),
            "expected an RSA, ECDSA or Ed25519 key",
        ),
    ]
    for path, reason in cases:
        with pytest.raises(ConfigurationError, match=rf"ssh_identity_file: {path}: .*{reason}") as caught:
            dstack.Client.from_config(
                project_name="main", server_url="http://s", user_token="t", ssh_identity_file=path
            )
        assert "c2VjcmV0" not in str(caught.value)


def test_the_callers_key_is_submitted_with_the_run_and_none_is_requested_from_the_server(
    driver: Driver, tmp_path: Path
) -> None:
    key = MAKERS["ecdsa"]()
    session = Operations(Api("http://s", "main"), 30, keys=LoginKeys(written(tmp_path, key)))
    script = Script(runs__get=[MISSING], runs__apply=[reply(run_json("submitted"))])
    driver.run(submission(session), script)
    sent = script.bodies("runs/apply")[0]["plan"]["run_spec"]["ssh_key_pub"]
    assert sent.split()[:2] == public_line(key).split()


def submission(session: Operations) -> Any:
    task = dstack.Task(commands=["true"])
    return session.submit(task, "train", SubmitOptions(), verify_ports=True, marker="mine", retry_budget=None)


@pytest.mark.parametrize(("version", "keeps_keys"), [("0.18.44", False), ("0.19.40", True), ("0.22.5", True)])
def test_the_servers_key_is_submitted_with_the_run_where_it_has_one(
    driver: Driver, version: str, keeps_keys: bool
) -> None:
    user = recorded(f"users_get_my_user_{version}")
    script = Script(
        users__get_my_user=[reply(user)], runs__get=[MISSING], runs__apply=[reply(run_json("submitted"))]
    )
    driver.run(submission(Operations(Api("http://s", "main"), 30)), script)
    sent = script.bodies("runs/apply")[0]["plan"]["run_spec"]["ssh_key_pub"]
    own = Path.home() / ".dstack" / "ssh" / "id_rsa"
    assert own.exists() is not keeps_keys
    assert sent == (user["ssh_public_key"] if keeps_keys else read_identity_file(own).public_line)


def test_a_generated_key_is_readable_by_its_owner_alone_and_reused() -> None:
    first = LoginKeys().own_public_key()
    path = Path.home() / ".dstack" / "ssh" / "id_rsa"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [item.name for item in path.parent.iterdir()] == ["id_rsa"]
    assert LoginKeys().own_public_key() == first
    assert LoginKeys().for_run(first, None, None, any_will_do=False).is_for(first)


def test_processes_that_generate_a_key_at_once_end_up_with_the_same_one() -> None:
    code = (
        "import sys; from dstack_core._attach.keys import LoginKeys; print('ready', flush=True); "
        "sys.stdin.readline(); print(LoginKeys().own_public_key())"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    printed = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        printed.append(worker.communicate(timeout=60)[0])
    assert len(set(printed)) == 1
    assert printed[0].startswith("ssh-rsa ")
    assert [item.name for item in (Path.home() / ".dstack" / "ssh").iterdir()] == ["id_rsa"]


def test_without_a_writable_home_the_run_is_submitted_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (Path.home() / ".dstack").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        line = LoginKeys().own_public_key()
    assert line.startswith("ssh-rsa ")
    [record] = caplog.records
    assert "attach() will not work" in record.getMessage()
    with pytest.raises(AttachError, match="got none"):
        LoginKeys().for_run(line, None, None, any_will_do=False)


def test_the_key_the_run_was_submitted_with_is_chosen(tmp_path: Path) -> None:
    given, servers = MAKERS["ed25519"](), MAKERS["rsa"]()
    pem = servers.private_bytes(PEM, PKCS8, OPEN).decode()
    keys = LoginKeys(written(tmp_path, given))
    default = keys.own_public_key()
    for wanted, source in [
        (public_line(given), str(tmp_path / "key")),
        (public_line(servers) + " admin\n", "the user's key on the server"),
        (default, str(Path.home() / ".dstack" / "ssh" / "id_rsa")),
    ]:
        found = keys.for_run(wanted, pem, None, any_will_do=False)
        assert (found.source, found.is_for(wanted)) == (source, True)


def test_when_no_key_matches_all_are_named_and_none_is_shown(tmp_path: Path) -> None:
    given, servers, wanted = MAKERS["ed25519"](), MAKERS["rsa"](), MAKERS["ed25519"]()
    pem = servers.private_bytes(PEM, PKCS8, OPEN).decode()
    keys = LoginKeys(written(tmp_path, given))
    with pytest.raises(AttachError) as caught:
        keys.for_run(public_line(wanted) + " me@laptop", pem, None, any_will_do=False)
    text = caught.value.message
    assert f"submitted with the SSH key {describe(public_line(wanted) + ' me@laptop')}" in text
    assert f"{tmp_path / 'key'} (ssh-ed25519 SHA256:" in text
    assert "the user's key on the server (ssh-rsa SHA256:" in text
    assert "ssh_identity_file=" in text
    assert "PRIVATE" not in text


def test_a_key_passed_to_attach_is_the_only_one_tried_and_the_sshproxy_may_accept_it(tmp_path: Path) -> None:
    given, wanted = MAKERS["ed25519"](), MAKERS["rsa"]()
    identity = read_identity_file(written(tmp_path, given))
    pem = wanted.private_bytes(PEM, PKCS8, OPEN).decode()
    with pytest.raises(AttachError, match=str(tmp_path)):
        LoginKeys().for_run(public_line(wanted), pem, identity, any_will_do=False)
    assert LoginKeys().for_run(public_line(wanted), pem, identity, any_will_do=True) is identity


def test_an_unreadable_server_key_is_logged_and_the_others_are_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = LoginKeys().own_public_key()
    chosen = LoginKeys().for_run(line, "<PRIVATE KEY PEM>", None, any_will_do=False)
    assert chosen.is_for(line)
    assert "Could not read" in caplog.text


def test_keys_are_named_by_the_fingerprint_ssh_shows(tmp_path: Path) -> None:
    key = read_identity_file(written(tmp_path, MAKERS["ed25519"]()))
    assert describe(key.public_line) == f"ssh-ed25519 {key.private.fingerprint} dstack-core"
    assert describe("no key at all") == "no key at all"


def test_no_private_key_is_in_a_repr(tmp_path: Path) -> None:
    path = written(tmp_path, MAKERS["ed25519"]())
    assert repr(read_identity_file(path)) == f"LoginKey(source={str(path)!r})"
