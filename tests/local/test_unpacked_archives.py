"""Archives are unpacked inside their directory, on Pythons with and without the filters of ``tarfile``."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest

from dstack_core.local.workspace import _unpack


@pytest.fixture(params=["with filters", "without filters"], autouse=True)
def filters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without filters":
        # As before Python 3.11.4, which Debian 12 has.
        monkeypatch.delattr(tarfile, "data_filter")


def archive_of(
    folder: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> Path:
    path = folder / "archive.tar"
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.mode, entry.uid = kind, link, mode, 12345
        entry.size = 2 if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(b"hi"))
    return path


def test_a_file_is_the_callers_and_has_no_special_rights(tmp_path: Path) -> None:
    _unpack(archive_of(tmp_path, "bin/tool", mode=0o6777), tmp_path / "job")
    found = (tmp_path / "job" / "bin" / "tool").stat()
    assert stat.S_IMODE(found.st_mode) == 0o755
    assert found.st_uid == tmp_path.stat().st_uid


def test_an_absolute_name_stays_inside(tmp_path: Path) -> None:
    _unpack(archive_of(tmp_path, f"{tmp_path}/outside"), tmp_path / "job")
    assert not (tmp_path / "outside").exists()
    assert [path.name for path in (tmp_path / "job").rglob("outside")] == ["outside"]


@pytest.mark.parametrize(
    ("kind", "name", "link"),
    [
        (tarfile.REGTYPE, "../outside", ""),
        (tarfile.LNKTYPE, "hard", "../secret"),
        (tarfile.FIFOTYPE, "pipe", ""),
        (tarfile.CHRTYPE, "null", ""),
    ],
)
def test_what_leads_out_and_special_files_are_refused(
    tmp_path: Path, kind: bytes, name: str, link: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(tarfile.TarError):
        _unpack(archive_of(tmp_path, name, kind, link), tmp_path / "job")
    assert not list((tmp_path / "job").iterdir())


def test_a_hard_link_names_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises((tarfile.TarError, KeyError)):
        _unpack(archive_of(tmp_path, "hard", tarfile.LNKTYPE, str(tmp_path / "secret")), tmp_path / "job")
    assert not (tmp_path / "job" / "hard").exists()
