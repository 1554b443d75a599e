"""Repositories that a job clones: tokens, submodules, and why a clone failed."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from dstack_core.local.bodies import RemoteRepoCreds
from dstack_core.local.checkout import check_out
from tests.contract.git_host import GitHost
from tests.local.support import Api
from tests.local.test_local_code import upload

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_git_repo_is_cloned_and_patched(api: Api, name: str, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    (tmp_path / "file.txt").write_text("old\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "file.txt").write_text("new\n")
    diff = git("diff").encode()
    info = {"repo_type": "remote", "repo_name": "repo"}
    creds = {"clone_url": str(tmp_path)}
    api.ok("{p}/repos/init", {"repo_id": "git-1", "repo_info": info, "repo_creds": creds})
    upload(api, "{p}/repos/upload_code", diff, repo_id="git-1")
    spec = {"repo_id": "git-1", "repo_data": {**info, "repo_hash": commit}}
    api.apply(name, "cat file.txt", spec=spec)
    assert api.output(api.wait(name)) == "old\r\n"
    spec["repo_code_hash"] = hashlib.sha256(diff).hexdigest()
    api.apply(f"{name}-diff", "cat file.txt", spec=spec)
    assert api.output(api.wait(f"{name}-diff")) == "new\r\n"


class _Private(SimpleHTTPRequestHandler):
    """A file server that requires the token, except below /public."""

    logins: ClassVar[dict[str, set[str | None]]] = {}

    def do_GET(self) -> None:
        login = self.headers["Authorization"]
        self.logins.setdefault(self.headers["Host"], set()).add(login)
        known = base64.b64encode(b"anything:tok-2").decode()
        if login == f"Basic {known}" or self.path.startswith("/public"):
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def _git_server(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Private, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Repository:
    """A work tree, and its bare repository on a server."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tree = folder / f"{name}-work"
        self.bare = folder / f"{name}.git"
        self.bare.parent.mkdir(exist_ok=True)
        subprocess.run(["git", "init", "--quiet", self.tree], check=True)

    def git(self, *arguments: str | Path) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(
            command, cwd=self.tree, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, **submodules: tuple[str, str]) -> str:
        """Commit all files and submodules (path: address and commit); return the commit."""
        self.git("add", ".")
        for path, (url, commit) in submodules.items():
            with (self.tree / ".gitmodules").open("a") as modules:
                modules.write(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n')
            self.git("add", ".gitmodules")
            self.git("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}")
        self.git("commit", "--quiet", "-m", "more")
        shutil.rmtree(self.bare, ignore_errors=True)
        self.git("clone", "--quiet", "--bare", ".", self.bare)
        self.git("-C", self.bare, "update-server-info")
        return self.git("rev-parse", "HEAD")


def _offer_repository(folder: Path, name: str) -> None:
    """Commit one file, whose text is the repository's name."""
    repository = _Repository(folder, name)
    (repository.tree / "file.txt").write_text(f"{name}\n")
    repository.commit()


def _submit_clone(api: Api, name: str, url: str, token: str, *commands: str, **data: str) -> Any:
    info = {"repo_type": "remote", "repo_name": "repo"}
    creds = {"clone_url": url, "oauth_token": token}
    api.ok("{p}/repos/init", {"repo_id": name, "repo_info": info, "repo_creds": creds})
    api.apply(name, *commands, spec={"repo_id": name, "repo_data": {**info, **data}})
    return api.wait(name)


def _message(run: Any) -> str:
    assert run["status"] == "failed"
    return str(run["latest_job_submission"]["termination_reason_message"])


def test_a_private_repo_is_cloned_with_its_token(api: Api, name: str, tmp_path: Path) -> None:
    _offer_repository(tmp_path, "private")
    with _git_server(tmp_path) as server:
        url = f"{server}/private.git"
        assert api.output(_submit_clone(api, name, url, "tok-2", "cat file.txt")) == "private\r\n"
        message = _message(_submit_clone(api, f"{name}-wrong", url, "wrong-1", "true"))
    assert (
        message
        == f"Failed to set up the repo (git clone: fatal: could not read Username for '{server}': terminal prompts disabled)"
    )


def test_a_failed_clone_names_its_cause_without_secrets(api: Api, name: str, tmp_path: Path) -> None:
    _offer_repository(tmp_path, "public")
    with _git_server(tmp_path) as server:
        url = f"{server}/public.git"
        secret = url.replace("://", "://user:secret-1@").replace("public", "tok-3")
        missing = {"repo_branch": "nope"}
        lost = {"repo_hash": "1" * 40}
        first = _message(_submit_clone(api, f"{name}-branch", url, "tok-3", "true", **missing))
        second = _message(_submit_clone(api, f"{name}-commit", url, "tok-3", "true", **lost))
        third = _message(_submit_clone(api, f"{name}-url", secret, "tok-3", "true"))
    assert (
        first
        == "Failed to set up the repo (git clone: fatal: Remote branch nope not found in upstream origin)"
    )
    assert second.startswith("Failed to set up the repo (git checkout: fatal: ")
    assert "1" * 40 in second
    assert "Authentication failed" in third
    assert "secret-1" not in third
    assert "tok-3" not in third


def test_submodules_are_cloned_with_the_token_of_their_host(api: Api, name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    inner, lib = _Repository(tmp_path / "here", "inner"), _Repository(tmp_path / "here", "lib")
    public, main = _Repository(tmp_path / "elsewhere", "public"), _Repository(tmp_path / "here", "main")
    for repository in (inner, public, main):
        (repository.tree / "file.txt").write_text(f"{repository.tree.name}\n")
    (lib.tree / ".gitattributes").write_text("*.txt text eol=crlf\n")
    (lib.tree / "file.txt").write_text("lib\n")
    old = main.commit()
    with _git_server(tmp_path / "here") as server, _git_server(tmp_path / "elsewhere") as other:
        lib_commit = lib.commit(inner=("../inner.git", inner.commit()))
        elsewhere = (f"{other}/public.git", public.commit())
        new = main.commit(lib=("../lib.git", lib_commit), public=elsewhere)
        commands = (
            "cat lib/file.txt | od -c | head -1",
            "cat lib/inner/file.txt public/file.txt",
            "git status -s",
        )
        url = f"{server}/main.git"
        run = _submit_clone(api, name, url, "tok-2", *commands, repo_hash=new)
        bytes_of_lib = ["0000000", "l", "i", "b", "\\n"]
        assert api.output(run).split() == [*bytes_of_lib, "inner-work", "public-work"]
        before = _submit_clone(api, f"{name}-old", url, "tok-2", "ls", "cat lib/file.txt", repo_hash=old)
        assert api.output(before).split() == ["file.txt", "lib", "public", "lib"]
        assert _Private.logins[other.removeprefix("http://")] == {None}, "the token stays with its host"
        shutil.rmtree(inner.bare)
        message = _message(_submit_clone(api, f"{name}-lost", url, "tok-2", "true", repo_hash=new))
        assert message.startswith("Failed to set up the repo (git submodule: fatal: ")


def test_a_clone_over_ssh_has_its_submodules_and_shows_errors_of_ssh(tmp_path: Path) -> None:
    lib, main = _Repository(tmp_path, "lib"), _Repository(tmp_path, "main")
    (lib.tree / "file.txt").write_text("lib\n")
    (main.tree / "file.txt").write_text("main\n")
    main.commit(lib=("../lib.git", lib.commit()))
    data = dict.fromkeys(("repo_branch", "repo_hash", "repo_config_name", "repo_config_email"))

    def clone(url: str, key: str, name: str) -> Path:
        code = tmp_path / name / "code"
        code.mkdir(parents=True)
        creds = RemoteRepoCreds(clone_url=url, private_key=key)
        check_out(creds, data, False, code, code.parent, code.parent / "key")
        assert [path.name for path in code.parent.iterdir()] == ["code"], "the key is gone"
        return code

    with GitHost(tmp_path) as host, GitHost(tmp_path) as other:
        url = host.url(main.bare)
        assert (clone(url, host.key, "whole") / "lib" / "file.txt").read_text() == "lib\n"
        with pytest.raises(
            subprocess.SubprocessError, match=r"^git clone: .*Permission denied \(publickey\)"
        ):
            clone(url, other.key, "refused")
        with pytest.raises(
            subprocess.SubprocessError, match=r"^git clone: fatal: Could not read from remote"
        ):
            clone(host.url(tmp_path / "none.git"), host.key, "none")
