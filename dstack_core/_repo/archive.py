"""Pack files and directories as plain tar archives (PROTOCOL 1.3)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._wire.code import Upload, biggest_of, too_big

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

PACK_LIMIT = 256 * 1024 * 1024
IGNORE_FILES = (".gitignore", ".dstackignore")
_WAY_OUT = "Name what the run does not need in .dstackignore"
_Rules = list[tuple[Path, "GitIgnoreSpec"]]


def pack_directory(root: Path) -> Upload:
    """Pack what ``.gitignore`` and ``.dstackignore`` leave of a directory; ``.git`` stays out.

    A directory within a Git repository is also subject to the ignore files of the directories above it.
    Raises ``ConfigurationError`` past 256 MiB; the server's own limit (2 MiB unless its operator changed
    it) is judged by the server.
    """
    what = f"repo_dir: {str(root)!r}"
    return _pack(what, ((path, path.relative_to(root).as_posix()) for path in _files(root)))


def pack_entry(what: str, path: Path) -> Upload:
    """Pack a file or a directory under its own name: an archive with one top-level entry.

    ``what`` names the parameter for the errors. Raises as ``pack_directory`` does.
    """
    if not path.is_dir():
        return _pack(what, iter([(path, path.name)]))
    inside = ((item, f"{path.name}/{item.relative_to(path).as_posix()}") for item in _files(path))
    return _pack(what, _first((path, path.name), inside))


def _first(entry: tuple[Path, str], rest: Iterator[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    yield entry
    yield from rest


def _pack(what: str, entries: Iterator[tuple[Path, str]]) -> Upload:
    buffer = io.BytesIO()
    sizes: list[tuple[str, int]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, name in entries:
            tar.add(path, arcname=name, recursive=False, filter=_without_owner)
            if not path.is_dir():
                sizes.append((name, path.lstat().st_size))
            if buffer.tell() > PACK_LIMIT:
                raise too_big(what, buffer.tell(), biggest_of(sizes), "it was not read to its end", _WAY_OUT)
    return Upload.of(what, _WAY_OUT, buffer.getvalue(), sizes)


def _files(root: Path) -> Iterator[Path]:
    return _walk(root, _rules_above(root))


def _walk(folder: Path, rules: _Rules) -> Iterator[Path]:
    rules = rules + _rules_of(folder)
    for path in sorted(folder.iterdir()):
        is_dir = path.is_dir() and not path.is_symlink()
        if path.name == ".git" or _is_ignored(path, is_dir, rules):
            continue
        if is_dir:
            yield from _walk(path, rules)
        elif path.is_file() or path.is_symlink():
            yield path


def _rules_above(root: Path) -> _Rules:
    """Return the rules of the directories between the top of a Git repository and ``root``."""
    above = [root, *root.parents]
    top = next((number for number, folder in enumerate(above) if (folder / ".git").exists()), 0)
    return [rule for folder in reversed(above[1 : top + 1]) for rule in _rules_of(folder)]


def _rules_of(folder: Path) -> _Rules:
    # Only those who pack a directory wait for the import.
    from pathspec import GitIgnoreSpec

    found = [folder / name for name in IGNORE_FILES]
    return [
        (folder, GitIgnoreSpec.from_lines(path.read_text(errors="replace").splitlines()))
        for path in found
        if path.is_file()
    ]


def _is_ignored(path: Path, is_dir: bool, rules: _Rules) -> bool:
    """Let the deepest file that speaks of the path decide, as git does."""
    for folder, spec in reversed(rules):
        name = path.relative_to(folder).as_posix() + ("/" if is_dir else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
