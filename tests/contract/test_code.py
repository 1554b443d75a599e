"""The code a run starts from, on the embedded server and on a real one."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests
import yaml

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.contract.git_host import GitHost

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")


def git(directory: Path, *arguments: str) -> str:
    command = ["git", *IDENTITY, *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def git_host(tmp_path: Path) -> Iterator[GitHost]:
    with GitHost(tmp_path.parent) as host:
        yield host


@pytest.fixture
def checkout(tmp_path: Path, git_host: GitHost) -> Path:
    """Return a clone of a repository, one commit ahead of it and with changes of every kind."""
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(tmp_path, "clone", "--quiet", f"file://{tmp_path}/origin.git", "work")
    work = tmp_path / "work"
    git(work, "checkout", "--quiet", "-b", "main")
    for name, text in {"kept.txt": "kept", "changed.txt": "old", "gone.txt": "gone"}.items():
        (work / name).write_text(f"{text}\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "pushed")
    git(work, "push", "--quiet", "-u", "origin", "main")
    # A run clones it over ssh; the test reads it from the disk.
    url = git_host.url(tmp_path / "origin.git")
    git(work, "remote", "set-url", "origin", url)
    git(work, "config", f"url.file://{tmp_path}/origin.git.insteadOf", url)
    (work / "unpushed.txt").write_text("unpushed\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "unpushed")
    (work / "changed.txt").write_text("changed\n")
    (work / "gone.txt").unlink()
    (work / "sub dir").mkdir()
    (work / "sub dir" / "neu \u00e9.txt").write_text("new\n")
    (work / "data.bin").write_bytes(bytes(range(256)))
    (work / ".gitignore").write_text("ignored.txt\n")
    (work / "ignored.txt").write_text("ignored\n")
    return work


def log_of(target: Target, run: dstack.Run) -> list[str]:
    outcome = run.wait(target.timeout, poll_interval=target.poll_interval)
    text = b"".join(run.logs()).decode()
    assert outcome.succeeded, (outcome.message, text)
    return text.splitlines()


def test_a_git_repository_arrives_with_unpushed_changes(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    commands = (
        "pwd",
        "cat kept.txt changed.txt unpushed.txt",
        "cat 'sub dir/neu \u00e9.txt'",
        "wc -c < data.bin",
        "ls gone.txt ignored.txt 2> /dev/null || echo missing",
        "git rev-parse HEAD",
    )
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        lines = log_of(target, client.runs.submit(target.task(*commands)))
        assert lines[0].endswith("/workflow")
        assert lines[1:] == [
            *("kept", "changed", "unpushed", "new", "256", "missing"),
            git(checkout, "rev-parse", "origin/main"),
        ]
        git(checkout, "push", "--quiet")
        git(checkout, "checkout", "--quiet", ".")
        git(checkout, "clean", "--quiet", "-fdx")
        clean = client.runs.submit(target.task("cat changed.txt unpushed.txt", "git status --short"))
        assert log_of(target, clean) == ["old", "unpushed"]


def test_local_repo_uploads_the_contents(target: Target, checkout: Path) -> None:
    (checkout / ".dstackignore").write_text("kept.txt\n")
    commands = (
        "cat changed.txt unpushed.txt",
        "ls -d .git kept.txt ignored.txt 2> /dev/null || echo missing",
    )
    with dstack.Client.from_config(checkout, local_repo=True, **target.arguments()) as client:
        lines = log_of(target, client.runs.submit(target.task(*commands)))
    assert lines == ["changed", "unpushed", "missing"]


@pytest.mark.parametrize("given", ["sub dir", "/workflow/sub dir", "./sub dir"])
def test_working_dir_is_below_the_code_or_absolute(
    target: Target, checkout: Path, git_host: GitHost, given: str
) -> None:
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        run = client.runs.submit(target.task("cat neu*"), working_dir=given)
        other = client.runs.submit(target.task("cat neu*", working_dir=given))
        assert (log_of(target, run), log_of(target, other)) == (["new"], ["new"])


def test_a_repository_named_in_the_configuration_arrives(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    pushed = git(checkout, "rev-parse", "origin/main")
    url = git_host.url(checkout.parent / "origin.git")
    path = checkout / "sub dir" / "run.dstack.yml"
    path.write_text(yaml.safe_dump(target.task("cat kept.txt changed.txt", repos=[".."])))
    with dstack.Client.from_config(git_private_key=git_host.key, **target.arguments()) as client:
        local = client.runs.submit(path)
        remote = client.runs.submit(
            target.task("cat kept.txt changed.txt", repos=[{"url": url, "branch": "main", "hash": pushed}])
        )
        assert (log_of(target, local), log_of(target, remote)) == (["kept", "changed"], ["kept", "old"])


def test_a_repository_is_placed_at_its_path(target: Target, checkout: Path, git_host: GitHost) -> None:
    commands = ("cat code/kept.txt code/changed.txt", "ls kept.txt 2> /dev/null || echo below")
    task = target.task(*commands, repos=[f"{checkout}:code"], working_dir="/here")
    with dstack.Client.from_config(git_private_key=git_host.key, **target.arguments()) as client:
        if target.release < (0, 20, 0):
            with pytest.raises(dstack.UnsupportedServerError, match=r"repos with path or if_exists: needs"):
                client.runs.submit(task)
            return
        assert log_of(target, client.runs.submit(task)) == ["kept", "changed", "below"]


def test_a_checkout_as_git_sync_makes_it_arrives(target: Target, checkout: Path) -> None:
    git(checkout.parent, "init", "--quiet", "root")
    git(checkout.parent / "root", "fetch", "--quiet", str(checkout), "main")
    git(checkout.parent / "root", "worktree", "add", "--quiet", "--detach", "tree", "FETCH_HEAD")
    with dstack.Client.from_config(checkout.parent / "root" / "tree", **target.arguments()) as client:
        run = client.runs.submit(target.task("cat kept.txt unpushed.txt", "ls -d .git || echo no .git"))
        assert log_of(target, run)[:2] == ["kept", "unpushed"]
        assert log_of(target, run)[-1] == "no .git"


def test_files_under_a_filter_arrive_as_they_are_here(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    git(checkout, "config", "filter.lfs.clean", "sha256sum")
    (checkout / ".gitattributes").write_text("*.bin filter=lfs -text\n")
    (checkout / "weights.bin").write_text("weights\n")
    git(checkout, "add", "weights.bin")
    assert len(git(checkout, "show", ":weights.bin")) > 60, "a pointer"
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        assert log_of(target, client.runs.submit(target.task("cat weights.bin"))) == ["weights"]


def test_links_of_a_files_entry_arrive_as_files(target: Target, tmp_path: Path) -> None:
    if target.release < (0, 19, 17):
        return
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "h1").write_text("weights\n")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.bin").symlink_to("../blobs/h1")
    task = target.task("cat model/model.bin", files=[f"{tmp_path}/snapshot:model"])
    with target.client() as client:
        assert log_of(target, client.runs.submit(task)) == ["weights"]


def test_a_submit_keeps_the_credentials_that_the_server_has(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        client.repos.init()
    for init in (True, False):
        with dstack.Client.from_config(checkout, init=init, **target.arguments()) as client:
            run = client.runs.submit(target.task("cat kept.txt changed.txt"))
            assert log_of(target, run) == ["kept", "changed"]


def test_files_are_placed_at_their_paths(target: Target, tmp_path: Path) -> None:
    (tmp_path / "conf" / "deep").mkdir(parents=True)
    (tmp_path / "conf" / "deep" / "a.ini").write_text("deep\n")
    (tmp_path / "conf" / "skipped.tmp").write_text("skipped\n")
    (tmp_path / "conf" / ".gitignore").write_text("*.tmp\n")
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "two.txt").write_text("two\n")
    files = ["one.txt", "./conf:/etc/conf", {"local_path": str(tmp_path / "two.txt"), "path": "~/2.txt"}]
    # The pretend host of the real server has a folder as the container's root.
    commands = ("cat one.txt ~/2.txt", "cd ..", "cat etc/conf/deep/a.ini", "ls etc/conf")
    configuration = target.task(*commands, files=files, working_dir="/here")
    path = tmp_path / "files.dstack.yml"
    path.write_text(yaml.safe_dump(configuration))
    with target.client() as client:
        if target.release < (0, 19, 17):
            with pytest.raises(dstack.UnsupportedServerError, match=r"files: needs dstack >= 0\.19\.17"):
                client.runs.submit(path)
            return
        assert log_of(target, client.runs.submit(path)) == ["one", "two", "deep", "deep"]


def test_files_and_code_arrive_together(target: Target, checkout: Path, git_host: GitHost) -> None:
    if target.release < (0, 19, 17):
        return
    task = target.task("cat conf/extra.txt kept.txt", files=[f"{checkout}/changed.txt:conf/extra.txt"])
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        assert log_of(target, client.runs.submit(task)) == ["changed", "kept"]


def test_without_init_a_repository_is_registered_by_hand(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    arguments = {**target.arguments(), "init": False, "git_private_key": git_host.key}
    task = target.task("cat kept.txt")
    with dstack.Client.from_config(checkout, **arguments) as client:
        before = {run.id for run in client.runs.list(all=True)}
        with pytest.raises(dstack.RequestRejectedError, match=r"client\.repos\.init\(\)") as caught:
            client.runs.submit(task)
        assert caught.value.code == "repo_does_not_exist"
        assert {run.id for run in client.runs.list(all=True)} == before
        client.repos.init()
        assert log_of(target, client.runs.submit(task)) == ["kept"]


@pytest.mark.parametrize("given", ["oauth_token", "git_identity_file"])
def test_the_server_keeps_how_a_repository_is_cloned(target: Target, checkout: Path, given: str) -> None:
    git(checkout, "remote", "set-url", "origin", "https://u:other@git.example/o/private.git")
    key = checkout.parent / "key"
    paramiko.ECDSAKey.generate().write_private_key_file(str(key))
    secret: dict[str, Any] = {given: "tok-3" if given == "oauth_token" else str(key)}
    with dstack.Client.from_config(checkout, **secret, **target.arguments()) as client:
        client.repos.init()
        client.repos.init()
        repo_id = client._operations.code.repository.describe().repo_id
    stored = requests.post(
        f"{target.url}/api/project/{target.project}/repos/get",
        json={"repo_id": repo_id, "include_creds": True},
        headers={"Authorization": f"Bearer {target.token}"},
        timeout=30,
    ).json()
    assert stored["repo_info"]["repo_name"] == "private"
    expected = {
        "oauth_token": ("https://git.example/o/private.git", "tok-3", None),
        "git_identity_file": ("ssh://git@git.example/o/private.git", None, key.read_text()),
    }[given]
    assert (
        tuple(stored["repo_creds"][name] for name in ("clone_url", "oauth_token", "private_key")) == expected
    )


def test_the_async_client_uploads_the_code_too(target: Target, checkout: Path, git_host: GitHost) -> None:
    async def go() -> bytes:
        async with dstack.AsyncClient.from_config(
            checkout, git_private_key=git_host.key, **target.arguments()
        ) as client:
            await client.repos.init()
            run = await client.runs.submit(target.task("cat kept.txt changed.txt"))
            await run.wait(target.timeout, poll_interval=target.poll_interval)
            return b"".join([chunk async for chunk in run.logs()])

    assert asyncio.run(go()) == b"kept\r\nchanged\r\n"


def test_the_error_for_a_diff_too_big_for_the_server_names_its_biggest_files(
    target: Target, checkout: Path, git_host: GitHost
) -> None:
    (checkout / "big.dat").write_bytes(b"x\n" * 1_500_000)
    with dstack.Client.from_config(checkout, git_private_key=git_host.key, **target.arguments()) as client:
        before = {run.id for run in client.runs.list(all=True)}
        with pytest.raises(dstack.ConfigurationError, match=r"the diff of .* is too big") as caught:
            client.runs.submit(target.task("echo never"))
        assert "big.dat (3.0 MB)" in str(caught.value)
        assert {run.id for run in client.runs.list(all=True)} == before
