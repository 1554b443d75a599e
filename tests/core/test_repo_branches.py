"""The branch and commit of the remote that a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.repos import REMOTE, clone_pair, commit, git, tree, write
from tests.core.test_repo_git import arrived, packed


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone_pair(tmp_path)


def _new_branch(work: Path) -> Path:
    git(work, "checkout", "--quiet", "-b", "mine")
    write(work, a="mine\n")
    commit(work)
    return work


def _upstream_deleted(work: Path) -> Path:
    git(work, "checkout", "--quiet", "-b", "merged")
    git(work, "push", "--quiet", "-u", "origin", "merged")
    git(work, "push", "--quiet", "origin", "merged:main")
    git(work, "push", "--quiet", "origin", ":merged")
    write(work, a="later\n")
    commit(work)
    return work


def _tracking_a_local_branch(work: Path) -> Path:
    git(work, "checkout", "--quiet", "--track", "-b", "mine", "main")
    commit(work)
    return work


def _detached_with_a_commit(work: Path) -> Path:
    git(work, "checkout", "--quiet", "--detach")
    write(work, a="detached\n")
    commit(work)
    return work


def _merge_of_a_pull_request(work: Path) -> Path:
    """Check out a merge as CI does with the whole history: the branches exist, and the merge is on none of them."""
    base = git(work, "rev-parse", "HEAD")
    git(work, "checkout", "--quiet", "-b", "feature")
    write(work, a="feature\n")
    head = commit(work)
    git(work, "checkout", "--quiet", "--detach", base)
    git(work, "merge", "--quiet", "--no-ff", "-m", "merge", head)
    return work


def _ci_of_a_branch(work: Path) -> Path:
    """Check out one commit of one branch, detached and without a local branch."""
    path = work.parent / "ci"
    path.mkdir()
    git(path, "init", "--quiet")
    git(path, "remote", "add", "origin", REMOTE)
    git(path, "config", f"url.file://{work.parent}/origin.git.insteadOf", REMOTE)
    fetched = "+refs/heads/main:refs/remotes/origin/main"
    git(path, "fetch", "--quiet", "--depth", "1", "origin", fetched)
    git(path, "checkout", "--quiet", "--detach", "refs/remotes/origin/main")
    return path


@pytest.mark.parametrize(
    "make",
    [
        _new_branch,
        _upstream_deleted,
        _tracking_a_local_branch,
        _detached_with_a_commit,
        _merge_of_a_pull_request,
        _ci_of_a_branch,
    ],
    ids=lambda make: make.__name__,
)
def test_the_newest_pushed_commit_of_another_branch_is_cloned(
    work: Path, tmp_path: Path, make: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    pushed = git(work, "rev-parse", "HEAD")
    root = make(work)
    code = packed(root)
    assert (code.data["repo_branch"], code.data["repo_hash"]) == ("main", pushed)
    assert tree(arrived(code, tmp_path)) == tree(root)
    assert caplog.text == ""


def test_of_several_branches_the_default_one_is_taken(work: Path) -> None:
    git(work, "push", "--quiet", "origin", "main:a-first", "main:mine")
    git(work, "remote", "set-head", "origin", "main")
    git(work, "checkout", "--quiet", "--detach")
    assert packed(work).data["repo_branch"] == "main"
    git(work, "checkout", "--quiet", "--no-track", "-b", "mine")
    assert packed(work).data["repo_branch"] == "mine"
