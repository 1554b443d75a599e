"""The facts read from a Git checkout, and its diff: any change, any configuration, the checkout unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Code
from tests.core.repos import REMOTE, clone_pair, commit, git, tree, write


def packed(root: Path) -> Code:
    code = Repository.checked(root).pack()
    assert code is not None
    return code


def arrived(code: Code, folder: Path) -> Path:
    """Return a checkout made as a run makes it: clone, check out, apply the diff."""
    assert code.clone is not None
    remote = f"file://{folder}/{code.clone.url.rpartition('/')[2]}"
    branch = code.data["repo_branch"]
    git(folder, "clone", "--quiet", "--no-checkout", "--single-branch", "-b", branch, remote, "run")
    # dstack's runner clones with go-git, which knows no attributes.
    attributes = "* -filter !working-tree-encoding -ident -text\n"
    (folder / "run" / ".git" / "info" / "attributes").write_text(attributes)
    git(folder / "run", "checkout", "--quiet", code.data["repo_hash"])
    if code.upload is not None:
        git(folder / "run", "apply", "--whitespace=nowarn", "-", stdin=code.upload.data)
    return folder / "run"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone_pair(tmp_path)


def test_a_clean_checkout_is_cloned_and_nothing_is_uploaded(work: Path) -> None:
    code = packed(work)
    assert code.upload is None
    assert code.info == {"repo_type": "remote", "repo_name": "origin"}
    assert code.data == {**code.info, "repo_branch": "main", "repo_hash": git(work, "rev-parse", "HEAD")}
    assert code.repo_id.startswith("origin-")


def test_the_commit_identity_is_the_same_in_the_run(work: Path) -> None:
    assert not [key for key in packed(work).data if key.startswith("repo_config")]
    git(work, "config", "user.name", "Ä B")
    (Path.home() / ".gitconfig").write_text("[user]\n\tname = other\n\temail = a@b.example\n")
    data = packed(work).data
    assert (data["repo_config_name"], data["repo_config_email"]) == ("Ä B", "a@b.example")


def _staged(work: Path) -> None:
    write(work, a="staged\n", fresh="staged\n")
    git(work, "add", "a", "fresh")
    write(work, a="staged\nand more\n")


def _odd_names(work: Path) -> None:
    for name in (" lead", "ü é", 'quo"te', "tab\there", "new\nline", "-dash", "*star", ":(top)", "\udcff"):
        (work / os.fsdecode(os.fsencode(name))).write_text(f"{name!r}\n")


def _kinds(work: Path) -> None:
    (work / "b").chmod(0o755)
    (work / "binary").write_bytes(bytes(range(256)) * 20)
    (work / "empty").touch()
    (work / "no-newline").write_text("x")
    (work / "crlf").write_bytes(b"1\r\n2\r\n")


def _moves(work: Path) -> None:
    (work / "a").rename(work / "moved")
    (work / "b").unlink()
    write(work, b__inner="now a directory\n")
    git(work, "mv", "sub/c", "sub/d")


def _unpushed(work: Path) -> None:
    write(work, a="committed\n", only__here="x\n")
    commit(work)
    git(work, "rm", "--quiet", "b")


def _conflict(work: Path) -> None:
    git(work, "checkout", "--quiet", "-b", "other")
    write(work, a="theirs\n")
    commit(work)
    git(work, "checkout", "--quiet", "main")
    write(work, a="ours\n")
    commit(work)
    with pytest.raises(AssertionError):
        git(work, "merge", "other")


def _behind(work: Path) -> None:
    write(work, later="x\n")
    commit(work)
    git(work, "push", "--quiet")
    git(work, "reset", "--quiet", "--hard", "HEAD~1")
    write(work, a="changed\n")


@pytest.mark.parametrize(
    "change", [_staged, _odd_names, _kinds, _moves, _unpushed, _conflict, _behind], ids=lambda f: f.__name__
)
def test_every_change_arrives_as_it_is(work: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    change(work)
    code = packed(work)
    assert code.upload is not None
    assert b"Unmerged" not in code.upload.data
    assert tree(arrived(code, tmp_path)) == tree(work)
    assert packed(work).upload == code.upload, "the same changes have the same hash"


def test_the_users_configuration_does_not_change_the_diff(work: Path) -> None:
    _staged(work)
    plain = packed(work).upload
    settings = {
        "diff.noprefix": "true",
        "diff.mnemonicPrefix": "true",
        "diff.external": "false",
        "diff.context": "0",
        "diff.renames": "copies",
        "diff.suppressBlankEmpty": "true",
        "color.ui": "always",
        "core.hooksPath": str(work / "sub"),
        "core.splitIndex": "true",
    }
    for name, value in settings.items():
        git(work, "config", name, value)
    hook = work / "sub" / "post-index-change"
    hook.write_text("#!/bin/sh\necho ran > ran\n")
    hook.chmod(0o755)
    (work / ".git" / "info" / "exclude").write_text("post-index-change\nran\n")
    assert packed(work).upload == plain
    assert not (work / "ran").exists()


def test_ignored_files_stay_here(work: Path, tmp_path: Path) -> None:
    write(work, **{"sub__x.log": "1", "sub__y.tmp": "2", "build__out": "3", "kept": "4"})
    (work / ".gitignore").write_text("*.log\n")
    (work / ".dstackignore").write_text("build/\n*.tmp\na\n")
    run = arrived(packed(work), tmp_path)
    assert set(tree(run)) == {"a", "b", "sub/c", "kept", ".gitignore", ".dstackignore"}


def test_taking_the_diff_leaves_the_repository_as_it_was(work: Path) -> None:
    git(work, "config", "core.splitIndex", "true")
    _staged(work)
    _kinds(work)

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (work / ".git").rglob("*") if path.is_file()}

    status, before = git(work, "status", "--porcelain"), state()
    assert packed(work).upload is not None
    assert state() == before
    assert git(work, "status", "--porcelain") == status


def test_git_variables_in_the_environment_do_not_change_the_repository(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert packed(work).data["repo_branch"] == "main"


def test_commits_and_branches_under_another_remote_name_are_found(work: Path, tmp_path: Path) -> None:
    head = git(work, "rev-parse", "HEAD")
    git(work, "checkout", "--quiet", "--detach")
    assert (packed(work).data["repo_branch"], packed(work).data["repo_hash"]) == ("main", head)
    git(work, "checkout", "--quiet", "-b", "feature")
    write(work, a="changed\n")
    assert tree(arrived(packed(work), tmp_path)) == tree(work)
    git(work, "push", "--quiet", "-u", "origin", "feature:team/feature")
    assert packed(work).data["repo_branch"] == "team/feature"


def test_a_shallow_clone_and_a_worktree_are_checkouts_too(work: Path, tmp_path: Path) -> None:
    write(work, more="x\n")
    commit(work)
    git(work, "push", "--quiet")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{tmp_path}/origin.git", "shallow")
    git(tmp_path / "shallow", "remote", "set-url", "origin", REMOTE)
    write(tmp_path / "shallow", a="shallow\n")
    assert tree(arrived(packed(tmp_path / "shallow"), tmp_path)) == tree(tmp_path / "shallow")
    git(work, "worktree", "add", "--quiet", str(tmp_path / "tree"), "-b", "side")
    write(tmp_path / "tree", fresh="x\n")
    upload = packed(tmp_path / "tree").upload
    assert upload is not None
    assert b"fresh" in upload.data


def test_an_unchanged_submodule_does_not_prevent_the_clone(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    module = clone_pair(tmp_path / "other", "module")
    git(work, "submodule", "--quiet", "add", f"file://{tmp_path}/other/origin.git", "lib")
    commit(work)
    git(work, "push", "--quiet")
    write(work, a="changed\n")
    assert packed(work).upload is not None
    write(work, lib__new="x\n")
    assert packed(work).data["repo_type"] == "local"
    assert "its submodule 'lib' has changes" in caplog.text
    assert module.is_dir()


def test_new_files_over_the_size_limit_are_not_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._code.diff.PACK_LIMIT", 100_000)
    (work / "big.bin").write_bytes(b"x" * 150_000)
    with pytest.raises(ConfigurationError, match=r"repo_dir: the diff of .* too big .*big\.bin \(0\.1 MB\)"):
        packed(work)
