"""The ``files`` of a configuration: its forms, the folder that paths are relative to, and what is packed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError, FileMapping
from dstack_core._code.archive import pack_files
from dstack_core._wire.code import Upload
from dstack_core._wire.spec import run_spec
from dstack_core.models.options import SubmitOptions
from tests.core.repos import write


def task(*files: Any) -> dstack.Configuration:
    return dstack.load_configuration({"type": "task", "commands": ["x"], "files": list(files)})


def packed(*files: Any) -> list[tuple[str, Upload]]:
    return pack_files(task(*files).files or [])


def names(upload: Upload) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(upload.data)) as tar:
        return tar.getnames()


@pytest.mark.parametrize(
    ("given", "local_path", "path"),
    [
        ("a.txt", "a.txt", "a.txt"),
        ("./conf:/etc/conf", "./conf", "/etc/conf"),
        ("~/.netrc", "~/.netrc", "~/.netrc"),
        ({"local_path": "a:b", "path": "c"}, "a:b", "c"),
        ({"local_path": "a"}, "a", "a"),
    ],
)
def test_every_form_is_sent_in_full(given: Any, local_path: str, path: str) -> None:
    expected = {"local_path": local_path, "path": path}
    spec = run_spec(task(given), SubmitOptions())
    assert spec["configuration"]["files"] == [expected]
    direct = dstack.Task(commands=["x"], files=[FileMapping(**expected)])
    assert run_spec(direct, SubmitOptions())["configuration"]["files"] == [expected]
    assert "file_archives" not in spec, "the archives are named once they are uploaded"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a:b:c", r"Task\.files, item 1: expected at most one colon, got 'a:b:c'\. Write"),
        ("", r"^Task\.files, item 1: expected the path of a file or a directory, got ''\.$"),
        (":/etc", r"^Task\.files, item 1: expected the path of a file or a directory, got ':/etc'\.$"),
        ({"path": "/etc"}, r"Task\.files, item 1, local_path: expected a value, got none"),
        ({"local_path": "a", "mode": 7}, r"Task\.files, item 1, mode: there is no such field"),
        (3, r"^Task\.files, item 1: expected a path, .*, got 3\.$"),
    ],
)
def test_an_invalid_entry_is_refused(given: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        task(given)


def test_paths_are_relative_to_the_file_or_else_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, sub__data="of the file\n", data="of the current directory\n")
    write(tmp_path, sub__x="type: task\ncommands: [x]\nfiles: [data, ~/home]\n")
    write(Path.home(), home="home\n")
    monkeypatch.chdir(tmp_path)
    loaded = dstack.load_configuration("sub/x")
    assert [FileMapping.model_validate(item).path for item in loaded.files or []] == ["data", "~/home"]
    monkeypatch.chdir("/")
    (data, first), (_, second) = pack_files(loaded.files or [])
    assert (data, b"of the file" in first.data, b"home" in second.data) == ("data", True, True)
    monkeypatch.chdir(tmp_path)
    assert b"of the current directory" in packed("data")[0][1].data


def test_an_archive_has_one_top_level_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path, conf__a="1", conf__deep__b="2", conf__skip="3", one="4", **{"conf__.dstackignore": "skip\n"}
    )
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path / "conf")
    files = packed(str(tmp_path / "conf"), "../one:/x", "../link", ".")
    assert [path for path, _ in files] == [str(tmp_path / "conf"), "/x", "../link", "."]
    whole = ["conf", "conf/.dstackignore", "conf/a", "conf/deep/b"]
    assert [names(upload) for _, upload in files] == [whole, ["one"], ["one"], whole]
    assert files[0][1].sha256 == files[3][1].sha256
    with tarfile.open(fileobj=io.BytesIO(files[2][1].data)) as tar:
        assert tar.getmember("one").isfile()


@pytest.mark.parametrize("given", ["nowhere", "/", "one/below"])
def test_the_error_for_a_missing_path_shows_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    write(tmp_path, one="1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=rf"^files: '{given}': expected a file or directory, got none at /"
    ):
        packed(given)
