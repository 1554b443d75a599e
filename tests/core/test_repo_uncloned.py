"""Checkouts that a run cannot clone: their files are uploaded, and one log line gives the reason."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Code
from tests.core.repos import REMOTE, clone_pair, commit, git, tree, write
from tests.core.test_repo_entries import members

FILES = {"a", "b", "sub/c"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone_pair(tmp_path)


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dstack_core")


def packed(root: Path) -> Code:
    code = Repository.checked(root).pack()
    assert code is not None
    return code


def uploaded(root: Path) -> set[str]:
    """Return the names of the files that are uploaded instead of cloning."""
    code = packed(root)
    assert code.data == {"repo_type": "local", "repo_dir": str(root)}
    assert (code.clone, code.repo_id.startswith(f"{root.name}-")) == (None, True)
    assert code.upload is not None
    return set(members(code.upload))


def _without_commit(work: Path) -> Path:
    git(work.parent, "init", "--quiet", "unborn")
    write(work.parent / "unborn", a="1", b="2", sub__c="3")
    return work.parent / "unborn"


def _without_remote(work: Path) -> Path:
    git(work, "remote", "remove", "origin")
    return work


def _git_sync(work: Path) -> Path:
    """Create a checkout as git-sync does: a detached worktree of a repository without remotes."""
    head = git(work, "rev-parse", "HEAD")
    git(work.parent, "init", "--quiet", "root")
    root = work.parent / "root"
    git(root, "fetch", "--quiet", "--depth", "1", f"file://{work.parent}/origin.git", head)
    git(root, "worktree", "add", "--quiet", "--detach", f".worktrees/{head}", head)
    return root / ".worktrees" / head


def _git_sync_without_its_repository(work: Path) -> Path:
    path = _git_sync(work)
    (work.parent / "root" / ".git").rename(work.parent / "elsewhere")
    return path


def _pull_request(work: Path) -> Path:
    """Check out a merge as CI does: one commit that is on no branch."""
    base = git(work, "rev-parse", "HEAD")
    git(work, "checkout", "--quiet", "-b", "feature")
    write(work, a="feature\n")
    head = commit(work)
    git(work, "checkout", "--quiet", "--detach", base)
    git(work, "merge", "--quiet", "--no-ff", "-m", "merge", head)
    git(work, "push", "--quiet", "origin", "HEAD:refs/pull/5/merge")
    return _ci_checkout(work, "refs/pull/5/merge", "refs/remotes/pull/5/merge")


def _tag(work: Path) -> Path:
    git(work, "checkout", "--quiet", "--detach")
    git(work, "tag", "v1", commit(work))
    git(work, "push", "--quiet", "origin", "v1")
    return _ci_checkout(work, "refs/tags/v1", "refs/tags/v1")


def _ci_checkout(work: Path, there: str, here: str) -> Path:
    path = work.parent / "ci"
    path.mkdir()
    git(path, "init", "--quiet")
    git(path, "remote", "add", "origin", REMOTE)
    git(path, "config", f"url.file://{work.parent}/origin.git.insteadOf", REMOTE)
    git(path, "fetch", "--quiet", "--depth", "1", "origin", f"+{there}:{here}")
    git(path, "checkout", "--quiet", "--detach", here)
    return path


def _unrelated(work: Path) -> Path:
    git(work, "checkout", "--quiet", "--orphan", "other")
    write(work, a="unrelated\n")
    commit(work)
    return work


def _local_path(work: Path) -> Path:
    git(work, "remote", "set-url", "origin", "../origin.git")
    return work


def _local_address(work: Path) -> Path:
    git(work, "remote", "set-url", "origin", f"file://{work.parent}/origin.git")
    return work


def _lost_path(work: Path) -> Path:
    git(work, "remote", "set-url", "origin", "/nowhere")
    return work


def _other_scheme(work: Path) -> Path:
    git(work, "remote", "set-url", "origin", "http://u:s3cr3t@git.example/o/r")
    return work


def _nested(work: Path) -> Path:
    git(work, "init", "--quiet", "inner")
    return work


def _new_link(work: Path) -> Path:
    (work / "link").symlink_to("a")
    return work


def _removed_link(work: Path) -> Path:
    _new_link(work)
    commit(work)
    git(work, "push", "--quiet")
    assert packed(work).upload is None
    (work / "link").unlink()
    return work


def _directory_now_a_file(work: Path) -> Path:
    (work / "sub" / "c").unlink()
    (work / "sub").rmdir()
    (work / "sub").write_text("now a file\n")
    return work


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_without_commit, "it has no commit"),
        (_without_remote, "it has no remote"),
        (_git_sync, "it has no remote"),
        (_git_sync_without_its_repository, "git cannot read it (not a git repository: "),
        (_pull_request, "no branch of its remote 'origin' is known here"),
        (_tag, "no branch of its remote 'origin' is known here"),
        (_unrelated, "no branch of its remote 'origin' is known to have its commits"),
        (_local_path, "its remote is the local path '"),
        (_local_address, "its remote is the local path '"),
        (_lost_path, "its remote is the local path '/nowhere'"),
        (_other_scheme, "its remote is reached over http, and a run clones over https and ssh only"),
        (_nested, "'inner/' in it is a Git repository of its own, which a diff cannot carry"),
        (_new_link, "its symbolic link 'link' was changed, which a diff cannot carry"),
        (_removed_link, "its symbolic link 'link' was changed, which a diff cannot carry"),
        (_directory_now_a_file, "its directory 'sub' is a file now, which a diff cannot carry"),
    ],
)
def test_the_files_are_uploaded_and_the_log_gives_the_reason(
    work: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], Path], reason: str
) -> None:
    root = make(work)
    caplog.clear()
    assert uploaded(root) == set(tree(root)), "without .git"
    (record,) = caplog.records
    start = f"repo_dir: uploading the files of {root} (0.0 MB) instead of cloning, because {reason}"
    assert record.getMessage().startswith(start)
    assert record.getMessage().endswith("Pass local_repo=True to upload without this message.")
    assert "s3cr3t" not in caplog.text
    caplog.clear()
    assert Repository.checked(root).describe().repo_id == packed(root).repo_id
    assert Repository.checked(root, local_repo=True).pack() is not None
    assert len(caplog.records) == 1, "a choice is not logged"


def test_a_checkout_of_another_owner_is_uploaded(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert uploaded(work) == FILES
    assert "git cannot read it (detected dubious ownership in repository at" in caplog.text
    assert "safe.directory" not in caplog.text


def test_without_git_a_checkout_is_uploaded(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert uploaded(work) == FILES
    assert "because there is no git on the PATH." in caplog.text
    assert packed(work / "sub").data == {"repo_type": "local", "repo_dir": str(work / "sub")}
    assert len(caplog.records) == 1


def test_tracked_files_are_uploaded_even_if_an_ignore_rule_matches(work: Path) -> None:
    write(work, build__kept="1", build__left="2", **{"data.bin": "3"})
    git(work, "add", "-f", "build/kept", "data.bin")
    write(work, **{".gitignore": "build/\n*.bin\n", ".dstackignore": "data.bin\n"})
    git(work, "remote", "remove", "origin")
    assert uploaded(work) == {*FILES, "build/kept", ".gitignore", ".dstackignore"}


def test_the_error_for_files_too_big_to_upload_gives_the_reason_for_the_upload(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core._code.archive.PACK_LIMIT", 100_000)
    (work / "big.bin").write_bytes(b"x" * 150_000)
    git(work, "remote", "remove", "origin")
    with pytest.raises(
        ConfigurationError, match=r"big\.bin .*\.dstackignore\. It cannot be cloned instead: it has no"
    ):
        packed(work)


def test_a_bare_repository_has_no_files(work: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"^repo_dir: expected a directory with files, got the bare Git repository '.*'",
    ):
        packed(work.parent / "origin.git")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
def test_git_itself_refuses_the_checkout_of_another_owner(work: Path) -> None:
    for path in (work, *work.rglob("*")):
        os.chown(path, 65533, 65533, follow_symlinks=False)
    assert stat.S_ISDIR(work.stat().st_mode)
    assert uploaded(work) == FILES
