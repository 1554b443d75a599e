"""Packing of files and directories as plain tar archives (PROTOCOL 1.3).

An archive is built in memory, because its hash and its size have to be known before the first request. The
server finds an archive by its hash, so a directory that does not change must give the same bytes each time:
members come sorted, and without owners.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dstack_core._code.ignored import walk
from dstack_core._code.links import EntryLinks, Member
from dstack_core._wire.code import Upload, biggest_of, too_big
from dstack_core.errors import ConfigurationError
from dstack_core.models.files import FileMapping

# Most bytes of an archive or a diff, which are held in memory: 128 times the server's own default limit
# (2 MiB). So it only stops a directory that was named by mistake, before the memory is full.
PACK_LIMIT = 256 * 1024 * 1024
_WAY_OUT = "Name what the run does not need in .dstackignore"


def pack_directory(root: Path, tracked: Collection[Path] = (), way_out: str = _WAY_OUT) -> Upload:
    """Pack what ``.gitignore`` and ``.dstackignore`` leave of a directory, without ``.git``.

    Links stay links. A directory within a Git repository is also subject to the ignore files above it, except
    for rules that cover all of it. The server applies its own size limit (2 MiB by default).

    Args:
        root: The directory.
        tracked: The files that git tracks and the directories they lie in; see ``walk``.
        way_out: The advice that ends the error for a directory that is too big.

    Raises:
        ConfigurationError: The archive exceeds 256 MiB, a file cannot be read, or the ignore files leave
            nothing.
    """
    what = f"repo_dir: {str(root)!r}"
    members = (Member(path, path.relative_to(root).as_posix()) for path in walk(root, tracked))
    try:
        upload = _pack(what, members, way_out)
    except OSError as error:
        raise ConfigurationError(f"{what}: {error.filename or root}: {error.strerror}.") from None
    if not upload.biggest and any(root.iterdir()):
        raise _nothing(what)
    return upload


def pack_entry(what: str, path: Path) -> Upload:
    """Pack a file or a directory under its own name: an archive with one top-level entry.

    Links that point out of the entry are replaced by their targets; see ``links``. ``what`` names the
    parameter in errors. Raises ``ConfigurationError`` as ``pack_directory`` does, for links that are not
    followed, and for a directory without files.
    """
    if not path.is_dir():
        return _pack(what, [Member(path, path.name)], _WAY_OUT)
    upload = _pack(what, EntryLinks(what).members(path, path.name), _WAY_OUT)
    if not upload.biggest:
        raise _nothing(what)
    return upload


def _nothing(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what}: expected a directory with at least one file, got one that packs to nothing. Put a file "
        "into it, or change its .gitignore and .dstackignore."
    )


def _pack(what: str, members: Iterable[Member], way_out: str) -> Upload:
    buffer = io.BytesIO()
    sizes: list[tuple[str, int]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            size = 0
            if not member.path.is_dir() or member.path.is_symlink():
                size = member.path.lstat().st_size
                sizes.append((member.name, size))
            # Checked with the file's size before it is read, so that one huge file does not fill the memory.
            if buffer.tell() + size > PACK_LIMIT:
                total = buffer.tell() + size
                raise too_big(what, total, biggest_of(sizes), "it was not read to its end", way_out)
            _add(tar, member)
    return Upload.of(what, way_out, buffer.getvalue(), sizes)


def _add(tar: tarfile.TarFile, member: Member) -> None:
    if member.link is None:
        tar.add(member.path, arcname=member.name, recursive=False, filter=_without_owner)
        return
    link = _without_owner(tar.gettarinfo(member.path, member.name))
    link.linkname = member.link
    tar.addfile(link)


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # The users of this machine mean nothing in the container.
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def pack_files(files: Iterable[FileMapping | Mapping[str, str] | str]) -> list[tuple[str, Upload]]:
    """Return each entry's path in the container with its archive.

    Local paths are relative to the current directory. Raises ``ConfigurationError`` for a path that does not
    exist, cannot be read, or passes through a link that git tracks.
    """
    mappings = [FileMapping.model_validate(file) for file in files]
    return [(mapping.path, _archive(mapping)) for mapping in mappings]


def _archive(mapping: FileMapping) -> Upload:
    what = f"files: {mapping.local_path!r}"
    named = Path(mapping.local_path).expanduser()
    try:
        path = EntryLinks(what).real_path(named)
        if not path.exists() or not path.name:
            raise ConfigurationError(f"{what}: expected a file or directory, got none at {path}.")
        return pack_entry(what, path)
    except OSError as error:
        raise ConfigurationError(f"{what}: {error.filename or named}: {error.strerror}.") from None
