"""Repos, uploaded code and file archives."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests

from tests.local.support import Api

LOCAL = {"repo_type": "local", "repo_dir": "/somewhere"}


def _tar(**files: str) -> bytes:
    return _linked(**files)


def _linked(*links: tuple[str, str], **files: str) -> bytes:
    """Return a tar with symbolic links (name, target), which come before the files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def _upload(api: Api, path: str, content: bytes, **query: str) -> requests.Response:
    digest = hashlib.sha256(content).hexdigest()
    url = f"{api.server.url}/api/{path.replace('{p}', 'project/main')}"
    return api.session.post(url, params=query, files={"file": (digest, content)}, timeout=10)


def _code(api: Api, repo: str, content: bytes) -> dict[str, Any]:
    api.ok("{p}/repos/init", {"repo_id": repo, "repo_info": LOCAL})
    reply = _upload(api, "{p}/repos/upload_code", content, repo_id=repo)
    assert (reply.status_code, reply.json()) == (200, None)
    return {"repo_id": repo, "repo_data": LOCAL, "repo_code_hash": hashlib.sha256(content).hexdigest()}


def test_uploaded_code_lies_in_the_working_directory(api: Api, name: str) -> None:
    spec = _code(api, "code-1", _tar(**{"main.py": "print('from main')", "pkg/data.txt": "data"}))
    api.apply(name, "python3 main.py", "cat pkg/data.txt", spec=spec, working_dir="/workflow")
    run = api.wait(name)
    assert api.output(run) == "from main\r\ndata"
    api.apply(f"{name}-sub", "cat data.txt", spec=spec, working_dir="/workflow/pkg")
    assert api.output(api.wait(f"{name}-sub")) == "data"


@pytest.mark.parametrize("content", [_tar(**{"../../evil": "x"}), b"this is no tar"])
def test_unsafe_or_broken_code_fails_the_job(api: Api, name: str, content: bytes) -> None:
    api.apply(name, "true", spec=_code(api, "code-2", content))
    job = api.wait(name)["latest_job_submission"]
    assert job["termination_reason"] == "container_exited_with_error"
    assert "Failed to set up the repo" in job["termination_reason_message"]
    assert api.server.directory is not None
    assert list(api.server.directory.rglob("evil")) == []


def test_links_of_uploaded_code_may_lead_anywhere(api: Api, name: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("from outside")
    links = [("data", str(tmp_path)), ("up", "../../../nowhere"), ("pkg/near", "x.txt"), ("loop", "loop")]
    spec = _code(api, "links-1", _linked(*links, **{"pkg/x.txt": "near"}))
    api.apply(name, "cat data/data.txt pkg/near", "readlink up loop", spec=spec, working_dir="/workflow")
    assert api.output(api.wait(name)) == "from outsidenear../../../nowhere\r\nloop\r\n"
    api.apply(f"{name}-in", "cat data.txt", spec=spec, working_dir="/workflow/data")
    assert api.output(api.wait(f"{name}-in")) == "from outside"
    archive = _upload(api, "files/upload_archive", _linked(("top/data", str(tmp_path)))).json()
    spec = {"file_archives": [{"id": archive["id"], "path": "/workflow/conf"}]}
    api.apply(f"{name}-files", "cat conf/data/data.txt", spec=spec, working_dir="/workflow")
    assert api.output(api.wait(f"{name}-files")) == "from outside"


def test_nothing_is_written_through_a_link(api: Api, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    hard = tarfile.TarInfo("hard")
    hard.type, hard.linkname = tarfile.LNKTYPE, "out"
    buffer = io.BytesIO(_linked(("out", str(outside))))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        tar.addfile(hard)
        entry = tarfile.TarInfo("hard/evil")
        tar.addfile(entry, io.BytesIO())
    archives = {
        "below": _linked(("out", str(outside)), **{"out/evil": "x"}),
        "link-below": _linked(("out", str(outside)), ("out/evil", "x")),
        "over": _linked(("out", str(outside)), ("./out/../out/kept", "x")),
        "hard": buffer.getvalue(),
    }
    for kind, content in archives.items():
        api.apply(f"{name}-{kind}", "true", spec=_code(api, f"links-{kind}", content))
        job = api.wait(f"{name}-{kind}")["latest_job_submission"]
        assert job["termination_reason"] == "container_exited_with_error", kind
        assert "Failed to set up the repo" in job["termination_reason_message"]
    spec = _code(api, "links-2", _linked(("out", str(outside)), ("kept", str(outside / "kept"))))
    archive = _upload(api, "files/upload_archive", _tar(x="x")).json()
    for kind, path in (("file", "out/evil"), ("dir", "out/evil/deep/x")):
        spec["file_archives"] = [{"id": archive["id"], "path": f"/workflow/{path}"}]
        api.apply(f"{name}-{kind}", "true", spec=spec)
        assert api.wait(f"{name}-{kind}")["latest_job_submission"]["termination_reason"] == "executor_error"
    del spec["file_archives"]
    api.apply(f"{name}-cwd", "true", spec=spec, working_dir="/workflow/out/evil")
    assert api.wait(f"{name}-cwd")["status"] == "failed"
    # What takes the place of a link replaces the link.
    spec["file_archives"] = [{"id": archive["id"], "path": f"/workflow/{path}"} for path in ("out", "kept")]
    api.apply(f"{name}-instead", "cat out kept", spec=spec, working_dir="/workflow")
    assert api.output(api.wait(f"{name}-instead")) == "xx"
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"kept": "kept"}


def test_repo_must_be_initialised_and_complete(api: Api) -> None:
    body = {"type": "task", "commands": ["true"]}
    for spec, code in (
        ({"repo_id": "unknown", "repo_data": LOCAL}, "repo_does_not_exist"),
        ({"repo_id": "unknown"}, "error"),
        ({"repo_data": LOCAL}, "error"),
    ):
        plan = {"run_spec": {"configuration": body, **spec}}
        reply = api.call("{p}/runs/apply", {"plan": plan, "force": False})
        assert (reply.status_code, reply.json()["detail"][0]["code"]) == (400, code)
    assert api.call("{p}/repos/get", {"repo_id": "unknown", "include_creds": True}).status_code == 400
    assert _upload(api, "{p}/repos/upload_code", b"x", repo_id="unknown").status_code == 400
    assert _upload(api, "{p}/repos/upload_code", b"x").status_code == 422


def test_upload_limit(api: Api) -> None:
    api.ok("{p}/repos/init", {"repo_id": "code-3", "repo_info": LOCAL})
    most = 2 * 1024 * 1024
    assert _upload(api, "{p}/repos/upload_code", b"x" * most, repo_id="code-3").status_code == 200
    assert _upload(api, "{p}/repos/upload_code", b"x" * (most + 1), repo_id="code-3").status_code == 400


def test_file_archive_is_placed_under_its_new_name(api: Api, name: str) -> None:
    content = _tar(**{"settings.ini": "[a]"})
    digest = hashlib.sha256(content).hexdigest()
    assert api.call("files/get_archive_by_hash", {"hash": digest}).status_code == 400
    archive = _upload(api, "files/upload_archive", content).json()
    assert archive["hash"] == digest
    assert _upload(api, "files/upload_archive", content).json() == archive
    assert api.ok("files/get_archive_by_hash", {"hash": digest}) == archive
    places = [{"id": archive["id"], "path": path} for path in ("/workflow/conf/new.ini", "~/.ini")]
    api.apply(name, "cat conf/new.ini ~/.ini", spec={"file_archives": places})
    assert api.output(api.wait(name)) == "[a][a]"


def test_path_leading_out_of_the_job_fails(api: Api, name: str) -> None:
    archive = _upload(api, "files/upload_archive", _tar(x="x")).json()
    api.apply(name, "true", spec={"file_archives": [{"id": archive["id"], "path": "/workflow/../../../x"}]})
    assert api.wait(name)["latest_job_submission"]["termination_reason"] == "executor_error"
    api.apply(f"{name}-dir", "true", working_dir="/workflow/../../..")
    assert (
        api.wait(f"{name}-dir")["latest_job_submission"]["termination_reason"]
        == "container_exited_with_error"
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
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
    _upload(api, "{p}/repos/upload_code", diff, repo_id="git-1")
    spec = {"repo_id": "git-1", "repo_data": {**info, "repo_hash": commit}}
    api.apply(name, "cat file.txt", spec=spec)
    assert api.output(api.wait(name)) == "old\r\n"
    spec["repo_code_hash"] = hashlib.sha256(diff).hexdigest()
    api.apply(f"{name}-diff", "cat file.txt", spec=spec)
    assert api.output(api.wait(f"{name}-diff")) == "new\r\n"


class _Private(SimpleHTTPRequestHandler):
    """Serve files to those who know the token."""

    def do_GET(self) -> None:
        login = base64.b64encode(b"anything:tok-2").decode()
        if self.headers["Authorization"] == f"Basic {login}":
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_private_repo_is_cloned_with_its_token(api: Api, name: str, tmp_path: Path) -> None:
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    git(["git", "init", "--quiet", "work"])
    (tmp_path / "work" / "file.txt").write_text("private\n")
    git(["git", "-C", "work", "add", "."])
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    git(["git", "-C", "work", *identity, "commit", "--quiet", "-m", "first"])
    git(["git", "clone", "--quiet", "--bare", "work", "bare.git"])
    git(["git", "-C", "bare.git", "update-server-info"])
    info = {"repo_type": "remote", "repo_name": "repo"}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Private, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for token, ending in (("tok-2", "done"), ("wrong", "failed")):
            url = f"http://127.0.0.1:{server.server_port}/bare.git"
            creds = {"clone_url": url, "oauth_token": token}
            api.ok("{p}/repos/init", {"repo_id": token, "repo_info": info, "repo_creds": creds})
            api.apply(f"{name}-{ending}", "cat file.txt", spec={"repo_id": token, "repo_data": info})
            run = api.wait(f"{name}-{ending}")
            assert run["status"] == ending
            message = run["latest_job_submission"]["termination_reason_message"] or ""
            assert token not in message
            assert ending == "failed" or api.output(run) == "private\r\n"
        server.shutdown()
