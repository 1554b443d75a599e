"""Packing a directory: what is included and what is left out."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from dstack_core._code.archive import pack_directory as pack
from dstack_core._code.repository import check_directory


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(root: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(pack(root).data)) as tar:
        return sorted(tar.getnames())


def test_ignore_files_are_honoured_as_in_git(tmp_path: Path) -> None:
    write(tmp_path, a="1", b="2", sub__b="3", sub__c="4", sub__deep__d="5", logs__x="6")
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git", config="secret")
    (tmp_path / ".gitignore").write_text("b\nlogs/\n")
    (tmp_path / ".dstackignore").write_text("a\n")
    (tmp_path / "sub" / ".gitignore").write_text("!b\nc\n/deep\n")
    assert names(tmp_path) == [".dstackignore", ".gitignore", "sub/.gitignore", "sub/b"]


def test_links_stay_links_and_owners_stay_here(tmp_path: Path) -> None:
    write(tmp_path, a="1")
    (tmp_path / "link").symlink_to("a")
    with tarfile.open(fileobj=io.BytesIO(pack(tmp_path).data)) as tar:
        assert tar.getmember("link").issym()
        assert {(member.uid, member.uname) for member in tar} == {(0, "")}


def test_links_that_point_outside_bring_nothing_along(tmp_path: Path) -> None:
    repo, outside = tmp_path / "repo", tmp_path / "outside"
    write(repo, a="1")
    write(outside, secret="do-not-upload", deep__secret="do-not-upload")
    (repo / "file").symlink_to(outside / "secret")
    (repo / "relative").symlink_to("../outside/secret")
    (repo / "folder").symlink_to(outside, target_is_directory=True)
    (repo / "circle").symlink_to(repo, target_is_directory=True)
    packed = pack(repo).data
    assert b"do-not-upload" not in packed
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {member.name: member.issym() for member in tar} == {
            "a": False, "circle": True, "file": True, "folder": True, "relative": True,
        }  # fmt: skip


def test_the_same_directory_gives_the_same_archive(tmp_path: Path) -> None:
    write(tmp_path, a="1", sub__b="2")
    first, second = pack(tmp_path), pack(tmp_path)
    assert first.sha256 == second.sha256
    write(tmp_path, a="other")
    assert pack(tmp_path).sha256 != first.sha256
    assert "other" not in repr(pack(tmp_path))


def test_a_file_is_refused_as_repo_dir(tmp_path: Path) -> None:
    write(tmp_path, a="1")
    with pytest.raises(ConfigurationError, match=r"repo_dir: expected a directory, got '.*a'"):
        check_directory(tmp_path / "a")


def test_a_directory_over_the_size_limit_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core._code.archive.PACK_LIMIT", 100_000)
    for number in range(20):
        (tmp_path / f"f{number:02}").write_bytes(b"x" * 50_000)
    with pytest.raises(ConfigurationError, match=r"too big to upload: 0\.\d MB .*f00 \(0\.1 MB\)"):
        pack(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="1", b="2")

    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "b"))

    # Root can read every file, so no file mode can refuse it.
    monkeypatch.setattr(tarfile.TarFile, "add", deny)
    with pytest.raises(ConfigurationError, match=r"^repo_dir: '.*': .*/b: Permission denied\.$"):
        pack(tmp_path)
