"""The requests for code and files: which, in which order, and how often."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError
from dstack_core._code.repository import Repository
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.local import LocalServer
from tests.core.repos import clone_pair, commit, git, tree, write

TASK = {"type": "task", "commands": ["true"]}
GET, INIT, UPLOAD, LOOK, APPLY = (
    *("repos/get", "repos/init", "repos/upload_code"),
    *("runs/get", "runs/apply"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


class Watched:
    """A server whose clients record the paths they request."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.paths: list[str] = []

    def arguments(self) -> dict[str, Any]:
        server = self.server
        return {"server_url": server.url, "project_name": server.project, "user_token": server.token}

    def client(self, repo_dir: Path | None, **given: Any) -> dstack.Client:
        client = dstack.Client.from_config(repo_dir, **given, **self.arguments())
        send: Callable[[Request], Reply] = client._transport

        def watch(request: Request) -> Reply:
            self.paths.append("/".join(request.path.partition("?")[0].split("/")[-2:]))
            return send(request)

        client._transport = watch  # type: ignore[assignment]
        return client

    def asked(self) -> list[str]:
        """Return the paths since the last call, without those that every submit requests."""
        paths, self.paths = self.paths, []
        return [path for path in paths if path not in ("users/get_my_user", "server/get_info")]


@pytest.fixture
def watched(server: LocalServer) -> Watched:
    server.faults.clear()
    return Watched(server)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = clone_pair(tmp_path)
    # One server for all tests: each has a repository of its own.
    git(work, "remote", "set-url", "origin", f"https://git.example/{tmp_path.name}/origin.git")
    return work


def test_a_client_of_from_config_without_code_requests_nothing_more(watched: Watched) -> None:
    client = watched.client(None)
    client.runs.submit(TASK)
    assert watched.asked() == [APPLY]
    # A marker of the caller's may be on a run already: one lookup, not two.
    client.runs.submit(TASK, run_name="marked-without-code", marker="caller:1")
    assert watched.asked() == [LOOK, APPLY]


def test_a_repository_is_registered_once_and_a_diff_uploaded_once(watched: Watched, work: Path) -> None:
    client = watched.client(work)
    assert watched.asked() == []
    client.runs.submit(TASK)
    assert watched.asked() == [GET, INIT, APPLY]
    write(work, a="changed\n")
    client.runs.submit(TASK)
    assert watched.asked() == [UPLOAD, APPLY]
    client.runs.submit(TASK)
    assert watched.asked() == [APPLY]


def test_a_run_that_exists_needs_no_upload(watched: Watched, work: Path) -> None:
    write(work, a="changed\n")
    run = watched.client(work).runs.submit({**TASK, "files": [str(work / "b")]}, marker="mine")
    archives = ["files/get_archive_by_hash", "files/upload_archive"]
    assert watched.asked() == [LOOK, *archives, GET, INIT, UPLOAD, LOOK, APPLY]
    again = watched.client(work).runs.submit(TASK, run_name=run.name, marker="mine")
    assert (again.id, watched.asked()) == (run.id, [LOOK])


def test_a_file_the_server_has_is_not_uploaded_again(watched: Watched, work: Path) -> None:
    (work / "b").write_text("only in this test\n")
    for uploads in (1, 0):
        watched.client(None).runs.submit({**TASK, "files": [f"{work}/b:/x", f"{work}/b:/y"]})
        assert watched.asked().count("files/upload_archive") == uploads


def test_without_init_nothing_is_requested_or_written_until_a_submit(watched: Watched, work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    client = watched.client(work, init=False)
    assert client.project in repr(client)
    assert type(client.repos).__name__ in repr(client.repos)
    assert watched.asked() == []
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    assert list(Path.home().iterdir()) == []


def test_making_a_client_starts_no_process(
    watched: Watched, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    client = watched.client(work)
    client.runs.submit(TASK)
    assert watched.asked() == [INIT, UPLOAD, APPLY], "without git, the files are uploaded"


@pytest.mark.parametrize("change", [False, True])
def test_without_init_the_error_for_an_unknown_repository_names_what_to_do(
    watched: Watched, work: Path, change: bool
) -> None:
    if change:
        write(work, a="changed\n")
    client = watched.client(work, init=False)
    way_out = r"Call client\.repos\.init\(\) once, or leave init=True"
    with pytest.raises(dstack.RequestRejectedError, match=way_out) as caught:
        client.runs.submit(TASK)
    assert (caught.value.code, caught.value.status) == ("repo_does_not_exist", 400)
    assert INIT not in watched.asked()
    client.repos.init()
    assert watched.asked() == [GET, INIT]
    client.runs.submit(TASK)
    assert watched.asked() == [UPLOAD, APPLY][0 if change else 1 :]


def test_a_deleted_repository_is_registered_again(watched: Watched, work: Path) -> None:
    client = watched.client(work)
    client.runs.submit(TASK)
    missing = {"detail": [{"msg": "Repo gone does not exist", "code": "repo_does_not_exist"}]}
    watched.server.faults.add(path=APPLY, status=400, body=missing)
    with pytest.raises(dstack.RequestRejectedError, match=r"It was deleted there; submit again"):
        client.runs.submit(TASK)
    watched.asked()
    client.runs.submit(TASK)
    assert watched.asked() == [GET, APPLY], "the repository exists all the time"


@pytest.mark.parametrize("status", [400, 413])
def test_a_refused_upload_is_reported_before_anything_is_submitted(
    watched: Watched, work: Path, status: int
) -> None:
    (work / "big.bin").write_bytes(b"x" * 600_000)
    body = {"detail": [{"msg": "exceeds the limit of 2MB", "code": "error"}]} if status == 400 else "nginx"
    for path, what in ((UPLOAD, "repo_dir: the diff of"), ("files/upload_archive", "files: '.*big.bin'")):
        watched.server.faults.add(path=path, status=status, body=body)
        files = [str(work / "big.bin")] if path != UPLOAD else []
        with pytest.raises(ConfigurationError, match=rf"^{what}.* is too big to upload: 0\.6 MB") as caught:
            watched.client(work).runs.submit({**TASK, "files": files})
        assert "big.bin (0.6 MB)" in str(caught.value)
        assert ("exceeds the limit of 2MB" if status == 400 else "413") in str(caught.value)
        assert APPLY not in watched.asked()


def test_the_error_of_a_server_without_files_names_the_version_that_has_them(
    watched: Watched, work: Path
) -> None:
    watched.server.faults.add(path="server/get_info", status=200, body={"server_version": "0.19.16"})
    with pytest.raises(
        dstack.UnsupportedServerError, match=r"^files: needs dstack >= 0\.19\.17, this server is 0\.19\.16"
    ):
        watched.client(None).runs.submit({**TASK, "files": [str(work / "b")]})
    assert APPLY not in watched.asked()


def test_a_wrong_configuration_is_refused_before_anything_is_packed(
    watched: Watched, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(work, "remote", "remove", "origin")
    with pytest.raises(ConfigurationError, match="max_price"):
        watched.client(work).runs.submit(TASK, max_price=-1)
    assert watched.asked() == []


def test_the_async_client_packs_outside_its_event_loop(
    watched: Watched, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    for name in ("pack", "describe"):
        true = getattr(Repository, name)

        def watch(*arguments: Any, true: Any = true) -> Any:
            threads.append(threading.current_thread())
            return true(*arguments)

        monkeypatch.setattr(Repository, name, watch)

    async def go() -> None:
        async with dstack.AsyncClient.from_config(work, **watched.arguments()) as client:
            await client.repos.init()
            await client.runs.submit(TASK)

    asyncio.run(go())
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_a_directory_below_the_top_is_an_archive_under_the_rules_above_it(work: Path) -> None:
    write(work, **{".gitignore": "*.log\n", "sub__x.log": "1", "sub__y": "2"})
    commit(work)
    code = Repository.checked(work / "sub").pack()
    assert code is not None
    assert code.info == {"repo_type": "local", "repo_dir": str(work / "sub")}
    assert code.upload is not None
    assert {name for name, _ in code.upload.biggest} == {"c", "y"}
    assert set(tree(work / "sub")) == {"c", "x.log", "y"}


def test_the_parameters_of_from_config_are_in_their_documented_order() -> None:
    documented = (
        *("repo_dir", "project_name", "server_url", "user_token", "git_identity_file", "oauth_token"),
        *("ssh_identity_file", "local_repo", "init"),
    )
    for kind in (dstack.Client, dstack.AsyncClient):
        parameters = inspect.signature(kind.from_config).parameters
        positional = [name for name, item in parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD]
        assert positional == [name for name in documented if name in parameters]
        assert (parameters["local_repo"].default, parameters["init"].default) == (False, True)
