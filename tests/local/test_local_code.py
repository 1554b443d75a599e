"""Repos, uploaded code and file archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
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


def upload(api: Api, path: str, content: bytes, **query: str) -> requests.Response:
    digest = hashlib.sha256(content).hexdigest()
    url = f"{api.server.url}/api/{path.replace('{p}', 'project/main')}"
    return api.session.post(url, params=query, files={"file": (digest, content)}, timeout=10)


def _code(api: Api, repo: str, content: bytes) -> dict[str, Any]:
    api.ok("{p}/repos/init", {"repo_id": repo, "repo_info": LOCAL})
    reply = upload(api, "{p}/repos/upload_code", content, repo_id=repo)
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
    archive = upload(api, "files/upload_archive", _linked(("top/data", str(tmp_path)))).json()
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
    archive = upload(api, "files/upload_archive", _tar(x="x")).json()
    for kind, path in (("file", "out/evil"), ("dir", "out/evil/deep/x")):
        spec["file_archives"] = [{"id": archive["id"], "path": f"/workflow/{path}"}]
        api.apply(f"{name}-{kind}", "true", spec=spec)
        assert api.wait(f"{name}-{kind}")["latest_job_submission"]["termination_reason"] == "executor_error"
    del spec["file_archives"]
    api.apply(f"{name}-cwd", "true", spec=spec, working_dir="/workflow/out/evil")
    assert api.wait(f"{name}-cwd")["status"] == "failed"
    # A file in the place of a link replaces the link.
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
    assert upload(api, "{p}/repos/upload_code", b"x", repo_id="unknown").status_code == 400
    assert upload(api, "{p}/repos/upload_code", b"x").status_code == 422


def test_upload_limit(api: Api) -> None:
    api.ok("{p}/repos/init", {"repo_id": "code-3", "repo_info": LOCAL})
    most = 2 * 1024 * 1024
    assert upload(api, "{p}/repos/upload_code", b"x" * most, repo_id="code-3").status_code == 200
    assert upload(api, "{p}/repos/upload_code", b"x" * (most + 1), repo_id="code-3").status_code == 400


def test_file_archive_is_placed_under_its_new_name(api: Api, name: str) -> None:
    content = _tar(**{"settings.ini": "[a]"})
    digest = hashlib.sha256(content).hexdigest()
    assert api.call("files/get_archive_by_hash", {"hash": digest}).status_code == 400
    archive = upload(api, "files/upload_archive", content).json()
    assert archive["hash"] == digest
    assert upload(api, "files/upload_archive", content).json() == archive
    assert api.ok("files/get_archive_by_hash", {"hash": digest}) == archive
    places = [{"id": archive["id"], "path": path} for path in ("/workflow/conf/new.ini", "~/.ini")]
    api.apply(name, "cat conf/new.ini ~/.ini", spec={"file_archives": places})
    assert api.output(api.wait(name)) == "[a][a]"


def test_an_absolute_working_dir_shows_where_absolute_paths_lie(api: Api, name: str) -> None:
    archive = upload(api, "files/upload_archive", _tar(x="x")).json()
    spec = {"file_archives": [{"id": archive["id"], "path": "/etc/app/x"}]}
    api.apply(name, "cat x; pwd; test -e /etc/app/x || echo not there", spec=spec, working_dir="/etc/app")
    output = api.output(api.wait(name))
    assert output.endswith("/rootfs/etc/app\r\nnot there\r\n")
    assert output.startswith("x/")


def test_path_leading_out_of_the_job_fails(api: Api, name: str) -> None:
    archive = upload(api, "files/upload_archive", _tar(x="x")).json()
    api.apply(name, "true", spec={"file_archives": [{"id": archive["id"], "path": "/workflow/../../../x"}]})
    assert api.wait(name)["latest_job_submission"]["termination_reason"] == "executor_error"
    api.apply(f"{name}-dir", "true", working_dir="/workflow/../../..")
    assert (
        api.wait(f"{name}-dir")["latest_job_submission"]["termination_reason"]
        == "container_exited_with_error"
    )
