"""A submit keeps the credentials that the server has for a repository."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import dstack_core as dstack
from dstack_core._code.repository import Repository
from dstack_core.local import LocalServer
from tests.core.repos import REMOTE, clone_pair
from tests.core.test_repo_delivery import TASK, Watched

GET, INIT, APPLY = "repos/get", "repos/init", "runs/apply"
SECRET = {"clone_url": "ssh://git@git.example/o/origin.git", "private_key": "k", "oauth_token": None}
PUBLIC = {"clone_url": REMOTE, "private_key": None, "oauth_token": None}


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture
def watched(server: LocalServer) -> Watched:
    return Watched(server)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone_pair(tmp_path)


class Stored:
    """The server's record of the repository, as `dstack init` leaves it."""

    def __init__(self, server: LocalServer, work: Path) -> None:
        self._server = server
        self._repo_id = Repository.checked(work).describe().repo_id

    def _ask(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(
            f"{self._server.url}/api/project/{self._server.project}/{path}",
            json={"repo_id": self._repo_id, **body},
            headers={"Authorization": f"Bearer {self._server.token}"},
            timeout=10,
        )

    def put(self, credentials: dict[str, Any] | None) -> None:
        info = {"repo_type": "remote", "repo_name": "origin"}
        assert self._ask("repos/init", {"repo_info": info, "repo_creds": credentials}).ok

    def credentials(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("repos/get", {"include_creds": True}).json()["repo_creds"]
        return {key: found[key] for key in SECRET}


@pytest.fixture
def stored(server: LocalServer, work: Path) -> Stored:
    return Stored(server, work)


@pytest.mark.parametrize("has", [SECRET, {**PUBLIC, "oauth_token": "t"}], ids=["key", "token"])
def test_what_dstack_init_stored_is_kept(
    watched: Watched, work: Path, stored: Stored, has: dict[str, Any]
) -> None:
    stored.put(has)
    client = watched.client(work)
    client.runs.submit(TASK)
    assert watched.asked() == [GET, APPLY]
    client.runs.submit(TASK)
    assert watched.asked() == [APPLY], "asked once"
    client.repos.init()
    assert (stored.credentials(), watched.asked()) == (has, [GET])
    watched.client(work, init=False).runs.submit(TASK)
    assert (stored.credentials(), watched.asked()) == (has, [APPLY])


def test_credentials_of_the_caller_replace_what_is_stored(
    watched: Watched, work: Path, stored: Stored
) -> None:
    stored.put(SECRET)
    watched.client(work, oauth_token="new").runs.submit(TASK)
    assert watched.asked() == [INIT, APPLY]
    assert stored.credentials() == {**PUBLIC, "oauth_token": "new"}
    watched.client(work).runs.submit(TASK)
    assert stored.credentials() == {**PUBLIC, "oauth_token": "new"}


def test_a_repository_without_credentials_of_this_user_gets_its_address(
    watched: Watched, work: Path, stored: Stored
) -> None:
    stored.put(None)
    watched.client(work).runs.submit(TASK)
    assert (stored.credentials(), watched.asked()) == (PUBLIC, [GET, INIT, APPLY])


def test_only_init_rewrites_an_address_without_a_secret(watched: Watched, work: Path, stored: Stored) -> None:
    old = {**PUBLIC, "clone_url": "https://git.example:8443/o/origin.git"}
    stored.put(old)
    watched.client(work).runs.submit(TASK)
    assert stored.credentials() == old
    watched.client(work).repos.init()
    assert stored.credentials() == PUBLIC


def test_the_async_client_keeps_them_too(server: LocalServer, work: Path, stored: Stored) -> None:
    stored.put(SECRET)

    async def go() -> None:
        arguments = Watched(server).arguments()
        async with dstack.AsyncClient.from_config(work, **arguments) as client:
            await client.repos.init()
            await client.runs.submit(TASK)

    asyncio.run(go())
    assert stored.credentials() == SECRET


def test_a_directory_needs_no_request(watched: Watched, work: Path) -> None:
    watched.client(work, local_repo=True).runs.submit(TASK)
    assert watched.asked() == [INIT, "repos/upload_code", APPLY]
    watched.client(None).runs.submit(TASK)
    assert watched.asked() == [APPLY]
