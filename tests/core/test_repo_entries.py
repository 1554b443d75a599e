"""The contents of a named ``files`` entry: ignored directories, and links that point out of it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from dstack_core._code.archive import pack_directory, pack_entry, pack_files
from dstack_core._wire.code import Upload
from tests.core.repos import commit, git, write


def members(upload: Upload) -> dict[str, str | bytes]:
    """Return the members of an archive: contents, and the targets of links."""
    with tarfile.open(fileobj=io.BytesIO(upload.data)) as tar:
        return {
            member.name: member.linkname
            if member.issym()
            else (b"" if (content := tar.extractfile(member)) is None else content.read())
            for member in tar
            if not member.isdir()
        }


def entry(path: Path) -> dict[str, str | bytes]:
    return members(pack_entry("files: 'x'", path))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    git(work, "init", "--quiet")
    return work


@pytest.mark.parametrize(
    "rule", ["data/", "data", "/top/data/", "top/data/*", "top/**", "top/data/**", "*", "top/", "**/data"]
)
def test_a_named_directory_is_packed_even_if_it_is_ignored(checkout: Path, rule: str) -> None:
    write(checkout, **{".gitignore": f"{rule}\n*.tmp\nnode_modules/\n"})
    write(checkout, top__data__a="1", top__data__deep__b="2", top__data__x__tmp="3")
    write(checkout, top__data__deep__node_modules__c="4", **{"top__data__junk.tmp": "5"})
    (checkout / "data").symlink_to("top/data")
    for named in (checkout / "top" / "data", (checkout / "data").resolve()):
        assert set(entry(named)) == {"data/a", "data/deep/b", "data/x/tmp"}
        assert set(members(pack_directory(named))) == {"a", "deep/b", "x/tmp"}


def test_ignore_rules_inside_a_named_directory_apply(checkout: Path) -> None:
    write(checkout, data__a="1", data__b="2", data__deep__c="3", **{".gitignore": "data/\n"})
    write(checkout / "data", **{".gitignore": "b\n", ".dstackignore": "deep/\n"})
    assert set(entry(checkout / "data")) == {"data/.dstackignore", "data/.gitignore", "data/a"}


def test_a_directory_that_packs_to_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, data__a="1", **{"data__.gitignore": "*\n"})
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "data", tmp_path / "empty"):
        with pytest.raises(
            ConfigurationError, match=r"^files: 'x': expected a directory with .* nothing\. Put"
        ):
            pack_entry("files: 'x'", path)
    with pytest.raises(ConfigurationError, match=r"^repo_dir: '.*data': .* packs to nothing"):
        pack_directory(tmp_path / "data")
    assert members(pack_directory(tmp_path / "empty")) == {}


def test_a_snapshot_of_links_arrives_as_files(tmp_path: Path) -> None:
    """Use the layout of the Hugging Face hub's cache: snapshots/REVISION/NAME links to blobs/HASH."""
    write(tmp_path, model__blobs__h1="weights", model__blobs__h2="{}")
    snapshot = tmp_path / "model" / "snapshots" / "r1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.bin").symlink_to("../../blobs/h1")
    (snapshot / "config.json").symlink_to(tmp_path / "model" / "blobs" / "h2")
    assert entry(snapshot) == {"r1/model.bin": b"weights", "r1/config.json": b"{}"}
    assert set(members(pack_directory(snapshot)).values()) == {"../../blobs/h1", f"{tmp_path}/model/blobs/h2"}


def test_links_within_the_entry_stay_links_and_linked_directories_are_packed(tmp_path: Path) -> None:
    write(tmp_path, data__a="1", data__deep__b="2", other__c="3", other__d="4")
    write(tmp_path, **{"other__.gitignore": "d\n"})
    write(tmp_path, other__far__e="5")
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "deep" / "up").symlink_to("../a")
    (data / "absolute").symlink_to(data / "deep" / "b")
    (data / "dangling").symlink_to("gone")
    (data / "out").symlink_to("../other")
    (other / "here").symlink_to("c")
    (other / "back").symlink_to(data / "a")
    assert entry(data) == {
        "data/a": b"1",
        "data/deep/b": b"2",
        "data/deep/up": "../a",
        "data/absolute": "deep/b",
        "data/dangling": "gone",
        "data/out/.gitignore": b"d\n",
        "data/out/c": b"3",
        "data/out/here": "c",
        "data/out/back": b"1",
        "data/out/far/e": b"5",
    }


@pytest.mark.parametrize(
    ("target", "name", "text"),
    [
        ("gone", "link", r"which does not exist or cannot be read"),
        (".", "link", r"which contains the link itself"),
        ("other", "link/back", r"which contains the link itself"),
    ],
)
def test_a_link_that_cannot_be_followed_is_named(tmp_path: Path, target: str, name: str, text: str) -> None:
    write(tmp_path, data__a="1", other__b="2")
    (tmp_path / "other" / "back").symlink_to("../data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / target)
    with pytest.raises(
        ConfigurationError, match=rf"^files: 'x': the link 'data/{name}' points to .*{text}\. Rep"
    ):
        pack_entry("files: 'x'", tmp_path / "data")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
@pytest.mark.parametrize("whose", ["link", "file"])
def test_the_files_of_another_user_are_not_read_through_a_link(tmp_path: Path, whose: str) -> None:
    write(tmp_path, data__a="1", secret="do-not-upload")
    link = tmp_path / "data" / "link"
    link.symlink_to("../secret")
    os.chown(link if whose == "link" else tmp_path / "secret", 12345, 12345, follow_symlinks=False)
    with pytest.raises(ConfigurationError, match=r"'data/link' .*another user than the link.*\.dstackignore"):
        pack_entry("files: 'x'", tmp_path / "data")
    os.chown(link, 12345, 12345, follow_symlinks=False)
    os.chown(tmp_path / "secret", 12345, 12345)
    assert entry(tmp_path / "data")["data/link"] == b"do-not-upload", "both belong to one user"


def test_a_repository_cannot_link_to_the_users_files(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkout.parent, secret="do-not-upload")
    write(checkout, data__a="1")
    (checkout / "data" / "theirs").symlink_to("../../secret")
    commit(checkout)
    with pytest.raises(ConfigurationError, match=r"'data/theirs' .* comes from a Git repository"):
        pack_entry("files: 'x'", checkout / "data")
    (checkout / "data" / "theirs").rename(checkout / "data" / "mine")
    git(checkout, "rm", "--quiet", "--cached", "data/theirs")
    assert entry(checkout / "data")["data/mine"] == b"do-not-upload"
    # Without git the owner of the link is unknown.
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match=r"'data/mine' .* comes from a Git repository"):
        pack_entry("files: 'x'", checkout / "data")


@pytest.mark.parametrize("named", ["lnk", "dl", "dl/o", "d/../dl/o", "own", "d"])
def test_a_tracked_link_is_not_followed_as_an_entry_or_on_the_way_to_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    write(checkout.parent, outside__o="s3cr3t")
    write(checkout, d__x="1")
    (checkout / "lnk").symlink_to("../outside/o")
    (checkout / "dl").symlink_to(checkout.parent / "outside")
    commit(checkout)
    (checkout / "own").symlink_to("dl/o")
    (checkout / "d" / "own").symlink_to("../dl/o")
    monkeypatch.chdir(checkout)
    with pytest.raises(ConfigurationError, match="comes from a Git repository, whose links are not followed"):
        pack_files([named])


def test_an_entry_reached_through_a_link_of_the_user_is_packed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(checkout, d__x="1")
    commit(checkout)
    (checkout / "own").symlink_to("d")
    (checkout.parent / "to-work").symlink_to("work")
    monkeypatch.chdir(checkout.parent)
    for named in ("to-work/own", "to-work/own/x", "work/d"):
        assert b"1" in pack_files([named])[0][1].data


def test_the_size_of_a_links_target_is_checked_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core._code.archive.PACK_LIMIT", 100_000)
    (tmp_path / "data").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**13)
    (tmp_path / "data" / "weights").symlink_to("../huge")
    with pytest.raises(ConfigurationError, match=r"too big to upload: .*data/weights \(10000000\.0 MB\)"):
        pack_entry("files: 'x'", tmp_path / "data")
