"""How a run clones a repository, with which secret, and where that secret must not appear."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests

import dstack_core as dstack
from dstack_core import ConfigurationError
from dstack_core._code.credentials import GitCredentials
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Clone, Code
from dstack_core.local import LocalServer
from tests.core.repos import clone_pair, git

TOKEN = "ghp_s3cr3t"
NOTHING = GitCredentials()
TARGET: dict[str, Any] = {"server_url": "http://127.0.0.1:9", "project_name": "main", "user_token": "tok-1"}


@pytest.fixture(scope="module")
def key_text() -> str:
    buffer = io.StringIO()
    paramiko.ECDSAKey.generate().write_private_key(buffer)
    return buffer.getvalue()


@pytest.fixture
def key_file(tmp_path: Path, key_text: str) -> Path:
    path = tmp_path / "id_ecdsa"
    path.write_text(key_text.rstrip("\n"))
    return path


def _encrypted(path: Path) -> None:
    paramiko.ECDSAKey.generate().write_private_key_file(str(path), password="pass")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no key", r"expected a private SSH key"),
        (
            b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
            r"expected a private SSH key",
        ),
        (b"\xff\xfe\x00", r"expected a private SSH key"),
        (b"", r"expected a private SSH key"),
        (None, r"expected a key without a passphrase"),
    ],
)
def test_an_unusable_key_is_refused_before_anything_is_sent(
    tmp_path: Path, content: bytes | None, text: str
) -> None:
    work = clone_pair(tmp_path)
    git(work, "remote", "set-url", "origin", "git@github.com:o/r.git")
    key = tmp_path / "key"
    if content is None:
        _encrypted(key)
    else:
        key.write_bytes(content)
    client = dstack.Client.from_config(work, git_identity_file=key, **TARGET)
    for action in (client.repos.init, lambda: client.runs.submit({"type": "task", "commands": ["x"]})):
        with pytest.raises(ConfigurationError, match=rf"^git_identity_file: .*key'.* {text}"):
            action()


def test_empty_secrets_are_ignored(tmp_path: Path) -> None:
    repository = Repository.checked(tmp_path, oauth_token="", git_identity_file="", git_private_key="")
    assert repository.credentials == NOTHING


def test_wrong_parameters_are_refused_at_once(tmp_path: Path, key_file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^git_identity_file: expected a file, got '.*nowhere'"):
        dstack.Client.from_config(tmp_path, git_identity_file=str(tmp_path / "nowhere"), **TARGET)
    with pytest.raises(
        ConfigurationError, match=r"^git_private_key: .* got a string that is not a key. Pass"
    ):
        dstack.Client.from_config(tmp_path, git_private_key=str(key_file), **TARGET)
    with pytest.raises(ConfigurationError, match=r"^repo_dir: expected a directory, got none"):
        dstack.Client.from_config(**TARGET).repos.init()


@pytest.mark.parametrize("name", ["git_identity_file", "git_private_key", "oauth_token"])
def test_credentials_without_a_repository_are_warned_about_once(
    key_file: Path, key_text: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = {"git_identity_file": str(key_file), "git_private_key": key_text, "oauth_token": TOKEN}[name]
    given: dict[str, Any] = {name: value}
    with LocalServer() as server:
        target: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        with dstack.Client.from_config(**given, **target) as client:
            client.runs.submit({"type": "task", "commands": ["true"]})

        async def submit() -> None:
            async with dstack.AsyncClient.from_config(**given, **target) as client:
                await client.runs.submit({"type": "task", "commands": ["true"]})

        asyncio.run(submit())
    text = f"{name}: the client has no repo_dir and the configuration no repos, so it is not used."
    assert [record.getMessage() for record in caplog.records if record.name == "dstack_core"] == [text] * 2


@pytest.mark.parametrize("client", [dstack.Client, dstack.AsyncClient])
@pytest.mark.parametrize("without", ["git_identity_file", "git_private_key", "oauth_token"])
def test_two_kinds_of_credentials_are_refused_by_name(
    tmp_path: Path, key_file: Path, key_text: str, without: str, client: type[Any]
) -> None:
    given = {"git_identity_file": str(key_file), "git_private_key": key_text, "oauth_token": TOKEN}
    del given[without]
    with pytest.raises(ConfigurationError, match=rf"^{' and '.join(given)}: expected one of") as caught:
        client.from_config(tmp_path, **given, **TARGET)
    assert TOKEN not in str(caught.value)
    assert key_text.split("\n")[1] not in str(caught.value)


@pytest.mark.parametrize(
    "change", [str.strip, lambda text: text.replace("\n", "\r\n"), lambda text: "\n" + text]
)
def test_a_key_is_read_in_every_form_a_host_stores_it(change: Callable[[str], str], key_text: str) -> None:
    assert GitCredentials.checked(git_private_key=change(key_text)).read_key() == key_text


def test_a_broken_key_text_is_named_without_being_shown(tmp_path: Path, key_text: str) -> None:
    work = clone_pair(tmp_path)
    git(work, "remote", "set-url", "origin", "git@github.com:o/r.git")
    secret = key_text.split("\n")[1]
    client = dstack.Client.from_config(work, git_private_key=key_text.replace(secret, secret[:9]), **TARGET)
    with pytest.raises(ConfigurationError, match=r"^git_private_key: expected a private SSH key") as caught:
        client.repos.init()
    assert secret[:9] not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.18.44", "https"),
        ("0.19.0", None),
        ("0.22.5", None),
        ("1.0.0rc1", None),
        (None, None),
        ("dev", None),
    ],
)
def test_the_protocol_is_named_to_old_servers_only(version: str | None, expected: str | None) -> None:
    from dstack_core._wire.api import Api
    from tests.core.scripted import reply

    api = Api("http://server", "main")
    release = api.get_release().parse(reply({"server_version": version}))
    code = Code.of_git("r", "h/o/r", "main", "1", Clone("https://h/o/r", oauth_token="t"), None)
    body = json.loads(api.init_repo(code, release).request.body or b"")
    assert body["repo_info"] == {"repo_type": "remote", "repo_name": "r"}
    wanted = {"clone_url": "https://h/o/r", "oauth_token": "t"} | ({"protocol": expected} if expected else {})
    assert body["repo_creds"] == wanted


def test_the_secrets_reach_the_server_and_nothing_else(
    tmp_path: Path, key_file: Path, key_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Break the server, and check everything that a person or a log can see."""
    caplog.set_level(logging.DEBUG)
    work = clone_pair(tmp_path)
    git(work, "remote", "set-url", "origin", f"https://u:{TOKEN}@github.com/o/r.git")
    secrets = (TOKEN, *key_text.split("\n")[1:3])
    seen: list[str] = []
    with LocalServer() as server:
        arguments: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
            "retry_budget": 0,
        }
        credentials: list[dict[str, Any]] = [
            {"oauth_token": TOKEN},
            {"git_identity_file": key_file},
            {"git_private_key": key_text},
        ]
        for given in credentials:
            with dstack.Client.from_config(work, **given, **arguments) as client:
                client.repos.init()
                seen += [repr(client), repr(client._operations), repr(vars(client))]
                for path in ("repos/init", "repos/upload_code", "runs/apply"):
                    (work / "new").write_text(path)
                    server.faults.add(
                        path=path, status=400, body={"detail": [{"msg": "no", "code": "error"}]}
                    )
                    fresh = dstack.Client.from_config(work, **given, **arguments)
                    with pytest.raises(dstack.DstackError) as caught:
                        fresh.runs.submit({"type": "task", "commands": ["x"]})
                    seen += [str(caught.value), repr(caught.value)]
                repository = Repository.checked(work, **given)
                stored = requests.post(
                    f"{server.url}/api/project/{server.project}/repos/get",
                    json={"repo_id": repository.describe().repo_id, "include_creds": True},
                    headers={"Authorization": f"Bearer {server.token}"},
                    timeout=10,
                ).json()["repo_creds"]
                assert (stored["oauth_token"] or stored["private_key"]) in (TOKEN, key_text)
                assert stored["clone_url"].endswith("github.com/o/r.git")
                seen += [repr(repository), repr(repository.pack()), repr(client._operations.init_repo())]
    seen += [record.getMessage() for record in caplog.records]
    assert not [text for text in seen for secret in secrets if secret in text]
