"""Runs clone private repositories with a connection of Airflow's type ``git``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests
from cryptography.hazmat.primitives import serialization as keys
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._git_connection import git_credentials
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.core.repos import clone_pair, git
from tests.provider_airflow.support import DagRunner, paths, runs_of
from tests.provider_airflow.test_filling import spec_of
from tests.provider_airflow.test_operator import CONTEXT
from tests.provider_airflow.test_secrets import kept

TOKEN, PASSPHRASE = "git-sesame-55", "open-the-key-66"
HTTPS, SSH = "https://git.example.com/team/code.git", "git@git.example.com:team/code.git"


@pytest.fixture(scope="module")
def key() -> str:
    buffer = io.StringIO()
    paramiko.ECDSAKey.generate().write_private_key(buffer)
    return buffer.getvalue()


def define(monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any] | None = None, **fields: Any) -> None:
    connection = {"conn_type": "git", "extra": extra or {}, **fields}
    monkeypatch.setenv("AIRFLOW_CONN_CODE", json.dumps(connection))


def test_no_connection_or_an_empty_one_gives_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_credentials(None) == {}
    define(monkeypatch, host=HTTPS)
    assert git_credentials("code") == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"host": HTTPS, "login": "user", "password": TOKEN},
        {"host": HTTPS.replace("://", f"://user:{TOKEN}@")},
        {"host": HTTPS.replace("://", "://user:git%2Dsesame-55@")},
        {"password": TOKEN},
    ],
    ids=["password", "in the URL", "quoted", "no URL"],
)
def test_the_token_is_the_password(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    define(monkeypatch, **fields)
    assert git_credentials("code") == {"oauth_token": TOKEN}


def test_the_url_decides_where_there_is_a_key_and_a_token(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    define(monkeypatch, {"private_key": key}, host=HTTPS, password=TOKEN)
    assert git_credentials("code") == {"oauth_token": TOKEN}
    define(monkeypatch, {"private_key": key}, host=SSH, password=TOKEN)
    assert git_credentials("code") == {"git_private_key": key}


def test_the_key_is_in_the_extra_or_in_a_file(
    monkeypatch: pytest.MonkeyPatch, key: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(key)
    define(monkeypatch, {"private_key": key, "strict_host_key_checking": "no"}, host=SSH)
    assert git_credentials("code") == {"git_private_key": key}
    define(monkeypatch, {"key_file": str(tmp_path / "key")}, host=SSH)
    assert git_credentials("code") == {"git_private_key": key}


@pytest.mark.parametrize("kind", ["openssh", "pem"])
def test_a_key_with_its_passphrase_is_opened(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made: Any = (
        ed25519.Ed25519PrivateKey.generate() if kind == "openssh" else rsa.generate_private_key(65537, 2048)
    )
    form = keys.PrivateFormat.OpenSSH if kind == "openssh" else keys.PrivateFormat.PKCS8
    closed = made.private_bytes(
        keys.Encoding.PEM, form, keys.BestAvailableEncryption(PASSPHRASE.encode())
    ).decode()
    define(monkeypatch, {"private_key": closed, "private_key_passphrase": PASSPHRASE}, host=SSH)
    opened = git_credentials("code")["git_private_key"]
    public = keys.load_ssh_private_key(opened.encode(), None).public_key()
    assert public == made.public_key()
    define(monkeypatch, {"private_key": closed, "private_key_passphrase": "another"}, host=SSH)
    with pytest.raises(AirflowFailException, match="private_key_passphrase opens") as caught:
        git_credentials("code")
    assert PASSPHRASE not in str(caught.value)


def test_a_passphrase_that_is_not_needed_does_not_matter(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    define(monkeypatch, {"private_key": key, "private_key_passphrase": PASSPHRASE}, host=SSH)
    assert git_credentials("code") == {"git_private_key": key}


@pytest.mark.parametrize(
    ("extra", "fields", "expected"),
    [
        (
            {"private_key": "a", "key_file": "b"},
            {},
            "expected private_key or key_file in the extra, got both",
        ),
        ({"key_file": "/nowhere/key"}, {}, "key_file '/nowhere/key', got none (No such file"),
        ({"github_app_id": "1", "github_installation_id": "2"}, {"host": HTTPS}, "got a GitHub App"),
        (
            {},
            {"conn_type": "dstack", "password": TOKEN},
            "expected a connection of type git, got one of type dstack",
        ),
        (
            {"private_key": "no key"},
            {"host": SSH},
            "git_conn_id 'code': expected the contents of a private key file",
        ),
    ],
)
def test_a_connection_that_cannot_be_used_is_one_clear_error(
    server: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
    extra: dict[str, Any],
    fields: dict[str, Any],
    expected: str,
    tmp_path: Path,
) -> None:
    define(monkeypatch, extra, **fields)
    task = DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["true"]},
        git_conn_id="code",
        repo_dir=str(tmp_path),
    )
    with pytest.raises(AirflowFailException) as caught:
        task.execute(CONTEXT)
    message = str(caught.value)
    assert expected in message
    assert not {"git_private_key", "git_identity_file", "oauth_token"}.intersection(message.split())
    assert TOKEN not in message
    assert paths(server, "/runs/apply") == []


def test_a_connection_without_code_is_one_warning(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    define(monkeypatch, {}, host=HTTPS, password=TOKEN)
    task = DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["true"]},
        git_conn_id="code",
        poll_interval=0.1,
    )
    lines: list[str] = []
    monkeypatch.setattr(task.log, "warning", lambda text, *values: lines.append(text % values))
    task.execute(CONTEXT)
    assert len([line for line in lines if line.startswith("git_conn_id: expected repo_dir")]) == 1


def test_a_missing_connection_is_named(server: LocalServer) -> None:
    with pytest.raises(AirflowFailException, match="there is none called 'nobody'"):
        git_credentials("nobody")


@pytest.mark.parametrize("kind", ["token", "key"])
def test_the_server_gets_the_credentials_and_nothing_shows_them(
    kind: str,
    key: str,
    dag_runner: DagRunner,
    server: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = HTTPS if kind == "token" else SSH
    define(monkeypatch, {"private_key": key} if kind == "key" else {}, host=url, password=TOKEN)
    (dag_runner.folder / kind).mkdir()
    work = clone_pair(dag_runner.folder / kind)
    git(work, "remote", "set-url", "origin", url)
    # The embedded server cannot reach this address, so the run fails; the server has received how to clone.
    ended = dag_runner.run(
        f"configuration=Task(commands=['true']), poll_interval=0.2, repo_dir='{kind}/work', "
        "git_conn_id='{{ \"code\" }}'"
    )
    output = capfd.readouterr().out
    (run,) = runs_of(server, ended.marker)
    reply = requests.post(
        f"{server.url}/api/project/{server.project}/repos/get",
        json={"repo_id": spec_of(server, run.name)["repo_id"], "include_creds": True},
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=10,
    )
    clone = reply.json()["repo_creds"]
    if kind == "token":
        assert clone == {"clone_url": HTTPS, "oauth_token": TOKEN, "private_key": None}
    else:
        assert (clone["clone_url"], clone["private_key"]) == ("ssh://git@git.example.com/team/code.git", key)
    rows = kept(ended.marker.removeprefix("airflow:").rstrip("/"))
    assert any("git_conn_id" in row for row in rows)
    for secret in (TOKEN, key.splitlines()[1]):
        assert secret not in output
        assert not [row for row in rows if secret in row]


def test_local_repo_uploads_the_contents(dag_runner: DagRunner, server: LocalServer) -> None:
    (dag_runner.folder / "pair").mkdir()
    git(clone_pair(dag_runner.folder / "pair"), "remote", "set-url", "origin", HTTPS)
    ended = dag_runner.run(
        "configuration=Task(commands=['grep -q 2 b']), poll_interval=0.2, repo_dir='pair/work', local_repo=True"
    )
    assert ended.task_state == "success"
