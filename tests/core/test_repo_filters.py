"""Files that git stores in another form than the working tree, such as those of Git LFS."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from tests.core.repos import clone_pair, commit, git, tree, write
from tests.core.test_repo_git import arrived, packed


def pointer(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()}  -\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a checkout with a filter that stores a pointer in the repository, as Git LFS does."""
    work = clone_pair(tmp_path)
    git(work, "config", "filter.lfs.clean", "sha256sum")
    git(work, "config", "filter.lfs.required", "true")
    (work / ".gitattributes").write_text(
        "*.bin filter=lfs diff=lfs merge=lfs -text\n*.txt working-tree-encoding=UTF-16LE eol=lf\n*.c ident\n"
    )
    write(work, **{"old.bin": "weights of old", "kept.bin": "weights"})
    (work / "old.txt").write_text("old\n", "utf-16-le")
    commit(work)
    git(work, "push", "--quiet")
    assert git(work, "show", "HEAD:old.bin") == pointer("weights of old").strip()
    assert git(work, "show", "HEAD:old.txt") == "old"
    return work


def test_new_and_modified_files_arrive_as_they_are_here(work: Path, tmp_path: Path) -> None:
    (work / "old.bin").write_bytes(bytes(range(256)))
    write(work, **{"new.bin": "new weights\n", 'dir__"odd".bin': "odd", "new\nline.bin": "line"})
    (work / "new.bin").chmod(0o755)
    (work / "old.txt").write_text("changed\n", "utf-16-le")
    (work / "new.txt").write_text("new\n", "utf-16-le")
    (work / "x.c").write_text("$Id: 123 $\n")
    git(work, "add", "new.bin")
    run = arrived(packed(work), tmp_path)
    here, there = tree(work), tree(run)
    assert there.pop("kept.bin") == ("file", pointer("weights").encode()), (
        "the run has what the repository has"
    )
    del here["kept.bin"]
    assert there == here


def test_an_unchanged_file_under_a_filter_does_not_count_as_a_change(work: Path) -> None:
    assert packed(work).upload is None
    (work / "old.bin").touch()
    assert packed(work).upload is None


def test_a_removed_file_under_a_filter_is_gone(work: Path, tmp_path: Path) -> None:
    (work / "old.bin").unlink()
    git(work, "rm", "--quiet", "--cached", "kept.bin")
    (work / ".git" / "info" / "exclude").write_text("kept.bin\n")
    assert "kept.bin" not in tree(run := arrived(packed(work), tmp_path))
    assert "old.bin" not in tree(run)


def test_contents_over_the_size_limit_are_not_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._code.diff.PACK_LIMIT", 100_000)
    (work / "old.bin").write_bytes(b"x" * 150_000)
    with pytest.raises(ConfigurationError, match=r"the diff of .* too big .*old\.bin \(0\.1 MB\)"):
        packed(work)
