"""Code of Airflow's own ``GitDagBundle``, and of a git-sync checkout, reaches the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.core.repos import clone_pair, commit, git, write
from tests.provider_airflow.test_filling import spec_of
from tests.provider_airflow.test_operator import CONTEXT, RUN

_TRUE_REMOTE = "https://git.example.com/team/dags.git"


def submitted(server: LocalServer, repo_dir: Path, **arguments: Any) -> dict[str, Any]:
    """Run a task with that code; return the run_spec that the server got."""
    what = {"type": "task", "commands": ["grep -q 2 b"]}
    task = DstackRunOperator(
        task_id="train", configuration=what, poll_interval=0.2, repo_dir=repo_dir, **arguments
    )
    task.execute(CONTEXT)
    return spec_of(server, RUN.name)


def bundle_of(folder: Path, *, version: bool, prune: bool = True, subdir: str | None = None) -> Path:
    """Return the path of the DAGs of a real bundle."""
    bundles = pytest.importorskip("airflow.providers.git.bundles.git", reason="the git provider is missing")
    work = clone_pair(folder)
    write(work, dags__train="1\n")
    head = commit(work)
    git(work, "push", "--quiet")
    bundle = bundles.GitDagBundle(
        # Airflow keeps the clone of a bundle by its name, also for the next test run on this machine.
        name=f"bundle-{uuid4().hex}",
        tracking_ref="main",
        repo_url=f"{folder}/origin.git",
        prune_dotgit_folder=prune,
        subdir=subdir,
        version=head if version else None,
    )
    bundle.initialize()
    path: Path = bundle.path
    return path


@pytest.mark.parametrize(
    ("version", "prune"),
    [(False, True), (True, True), (True, False)],
    ids=["tracking", "version", "version with .git"],
)
def test_the_code_of_a_bundle_arrives(
    server: LocalServer, tmp_path: Path, version: bool, prune: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = bundle_of(tmp_path, version=version, prune=prune)
    with caplog.at_level(logging.INFO, logger="dstack_core"):
        spec = submitted(server, path)
    # Its remote is a bare repository of this machine, and that one's is a path as well.
    assert spec["repo_data"]["repo_type"] == "local"
    said = [record.getMessage() for record in caplog.records if record.name == "dstack_core"]
    assert len([line for line in said if "upload" in line]) == (0 if version and prune else 1), said


def test_the_subdirectory_of_a_bundle_is_uploaded(server: LocalServer, tmp_path: Path) -> None:
    path = bundle_of(tmp_path, version=True, subdir="sub")
    task = DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["grep -q 3 c"]},
        poll_interval=0.2,
        repo_dir=path,
    )
    assert task.execute(CONTEXT)["status"] == "done"


def test_a_bundle_of_a_repository_that_runs_reach_is_cloned_from_there(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_of(tmp_path, version=False)
    origin = git(path, "remote", "get-url", "origin")
    git(Path(origin), "remote", "set-url", "origin", _TRUE_REMOTE)
    monkeypatch.setenv(
        "AIRFLOW_CONN_GIT_DEFAULT",
        '{"conn_type": "git", "host": "https://git.example.com/team/dags.git", "password": "git-sesame-55"}',
    )
    task = DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["true"]},
        poll_interval=0.2,
        repo_dir=path,
        git_conn_id="git_default",
    )
    # No machine of this test reaches that address.
    with pytest.raises(Exception, match="Run d-train-"):
        task.execute(CONTEXT)
    spec = spec_of(server, RUN.name)
    assert spec["repo_data"]["repo_type"] == "remote"
    assert spec["repo_data"]["repo_name"] == "dags"
    assert "git-sesame-55" not in str(spec)


def test_a_git_sync_checkout_is_uploaded(
    server: LocalServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As git-sync does it: a detached worktree of a bare repository that has no remote, behind a link.
    work = clone_pair(tmp_path)
    head = git(work, "rev-parse", "HEAD")
    git(tmp_path, "clone", "--quiet", "--bare", str(work), "root")
    git(tmp_path / "root", "remote", "remove", "origin")
    git(tmp_path / "root", "worktree", "add", "--quiet", "--detach", f"{tmp_path}/worktrees/{head}", head)
    (tmp_path / "current").symlink_to(tmp_path / "worktrees" / head)
    with caplog.at_level(logging.INFO, logger="dstack_core"):
        spec = submitted(server, tmp_path / "current")
    assert spec["repo_data"]["repo_type"] == "local"
    said = [record.getMessage() for record in caplog.records if record.name == "dstack_core"]
    assert len([line for line in said if "upload" in line]) == 1, said
