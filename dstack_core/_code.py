"""Pack a directory for upload (PROTOCOL 1.3)."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from dstack_core.errors import ConfigurationError

_IGNORE_FILES = (".gitignore", ".dstackignore")
_PACK_LIMIT = 256 * 1024 * 1024
_Rules = list[tuple[Path, GitIgnoreSpec]]


@dataclass(frozen=True, slots=True)
class CodeArchive:
    """Hold a packed directory: a plain tar, its sha256, and its biggest files with their bytes."""

    repo_id: str
    repo_dir: str
    sha256: str
    data: bytes = field(repr=False)
    biggest: tuple[tuple[str, int], ...]

    def too_big(self, told: str) -> ConfigurationError:
        """Return the error for a directory the server did not take; ``told`` is its reason."""
        return _too_big(self.repo_dir, len(self.data), self.biggest, told)


def check_directory(repo_dir: str | os.PathLike[str]) -> Path:
    """Return the directory with ``~`` expanded, or raise ``ConfigurationError`` when it is none."""
    path = Path(repo_dir).expanduser().resolve()
    if not path.is_dir():
        raise ConfigurationError(f"repo_dir: {os.fspath(repo_dir)!r} is no directory")
    return path


def pack(root: Path) -> CodeArchive:
    """Pack what ``.gitignore`` and ``.dstackignore`` leave of a directory; ``.git`` stays out.

    Raises ``ConfigurationError`` past 256 MiB; the server's own limit (2 MiB unless its operator
    changed it) is judged by the server.
    """
    buffer = io.BytesIO()
    sizes: list[tuple[str, int]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _files(root, root, []):
            name = path.relative_to(root).as_posix()
            tar.add(path, arcname=name, recursive=False, filter=_without_owner)
            sizes.append((name, path.lstat().st_size))
            if buffer.tell() > _PACK_LIMIT:
                raise _too_big(str(root), buffer.tell(), _biggest(sizes), "it was not read to its end")
    data = buffer.getvalue()
    return CodeArchive(_repo_id(root), str(root), hashlib.sha256(data).hexdigest(), data, _biggest(sizes))


def _files(root: Path, folder: Path, rules: _Rules) -> Iterator[Path]:
    rules = rules + _rules_of(folder)
    for path in sorted(folder.iterdir()):
        is_dir = path.is_dir() and not path.is_symlink()
        if path.name == ".git" or _is_ignored(path, is_dir, rules):
            continue
        if is_dir:
            yield from _files(root, path, rules)
        elif path.is_file() or path.is_symlink():
            yield path


def _rules_of(folder: Path) -> _Rules:
    found = [folder / name for name in _IGNORE_FILES]
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


def _repo_id(root: Path) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", root.name.lower()).strip("-") or "repo"
    return f"{slug[:40]}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def _biggest(sizes: list[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes, key=lambda item: -item[1])[:5])


def _too_big(repo_dir: str, size: int, biggest: tuple[tuple[str, int], ...], told: str) -> ConfigurationError:
    files = ", ".join(f"{name} ({bytes_ / 1e6:.1f} MB)" for name, bytes_ in biggest)
    return ConfigurationError(
        f"repo_dir: {repo_dir!r} is too big to upload: {size / 1e6:.1f} MB ({told}). "
        f"Its biggest files: {files}. Name what the run does not need in .dstackignore"
    )
