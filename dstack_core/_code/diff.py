"""What a checkout has beyond a commit, as a diff, without touching the user's index.

The problem: the run clones a pushed commit, and the user means the files as they are: with changes that are
staged, unstaged or not pushed, and with new files. ``git diff`` shows no new files; adding them would change
the index of a user who may be at work in it.

The idea: git works on a copy of the index and writes new objects into a temporary directory, with the
repository's own objects as an alternate (``_scratch``). There everything that differs is added, and the diff
is that of the copy against the commit.

Invariants:
  * Neither the index, nor the objects, nor a file of the repository changes.
  * The diff has one form, whatever the user configured (``_FORM``), since the server's tools have to apply
    it.
  * What a diff cannot carry (submodules, nested repositories, symbolic links, a directory that became a file)
    raises ``CannotCloneError``; the caller then uploads the files as an archive. No change is dropped.
  * A file that git converts (Git LFS and other filters) is added as it is on this disk, because the run
    applies no filters.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dstack_core._code.archive import PACK_LIMIT
from dstack_core._code.git import Git
from dstack_core._code.remote import CannotCloneError
from dstack_core._wire.code import Upload, biggest_of, too_big

_SUBMODULE = "160000"
_LINK = "120000"
# Attributes with which git stores a file in another form than it has on the disk, beyond its line ends.
_CONVERSIONS = ("filter", "working-tree-encoding", "ident")
_WAY_OUT = (
    "Name new files the run does not need in .gitignore or .dstackignore, or commit and push what is big"
)
# The form of diff that every server applies, whatever the user configured.
_FORM = (
    "--binary",
    "--full-index",
    "--no-renames",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--unified=3",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--ignore-submodules=all",
)


def take_diff(git: Git, commit: str) -> Upload | None:
    """Return the diff between ``commit`` and the files as they are, None if there is no difference.

    Staged, unstaged and unpushed changes and new files are in it; what ``.gitignore`` names, and new
    files that ``.dstackignore`` names, are not. Raises ``CannotCloneError`` for changes that a diff cannot
    carry, and ``ConfigurationError`` past 256 MiB.
    """
    what = f"repo_dir: the diff of {str(git.directory)!r}"
    with tempfile.TemporaryDirectory(prefix="dstack-core-") as folder:
        env = _scratch(git, Path(folder))
        changed = _changed(git, commit, env)
        new = _new(git, env)
        if not changed and not new:
            return None
        _check_places(changed, new)
        gone = [name for name, status in changed.items() if status == "D" and name not in new]
        here = [name for name in dict.fromkeys((*changed, *new)) if name not in gone]
        raw = _converted(git, here, env)
        sizes = [(name, _size(git.directory / name)) for name in here]
        # Changed files count only as far as they differ, which is not known yet; new ones count whole.
        fresh = sum(size for name, size in sizes if name in raw or changed.get(name, "A") == "A")
        if fresh > PACK_LIMIT:
            raise too_big(what, fresh, biggest_of(sizes), "it was not read", _WAY_OUT)
        # From here on the scratch index is the commit, then the commit with every difference.
        git.output("read-tree", commit, env=env)
        if gone:
            git.output("update-index", "--force-remove", "-z", "--stdin", env=env, stdin=_names(gone))
        rest = _names(name for name in here if name not in raw)
        git.output("update-index", "--add", "--remove", "--replace", "-z", "--stdin", env=env, stdin=rest)
        if raw:
            _add_raw(git, raw, env)
        data = git.output(
            "-c", "diff.suppressBlankEmpty=false", "diff", "--cached", *_FORM, commit, "--", env=env
        )
    return Upload.of(what, _WAY_OUT, data, sizes) if data else None


def _check_places(changed: dict[str, str], new: list[str]) -> None:
    # Source: dstack's runner (its repo/diff.go) writes the file while the directory is still there.
    added = {*new, *(name for name, status in changed.items() if status == "A")}
    for name in (name for name, status in changed.items() if status == "D"):
        for folder in PurePosixPath(name).parents:
            if str(folder) in added:
                raise CannotCloneError(
                    f"its directory {str(folder)!r} is a file now, which a diff cannot carry"
                )


def _converted(git: Git, names: list[str], env: dict[str, str]) -> set[str]:
    """Return the files that git stores in another form than they have here, such as those of Git LFS."""
    output = git.output("check-attr", "-z", "--stdin", *_CONVERSIONS, env=env, stdin=_names(names))
    items = os.fsdecode(output).split("\0")
    converted = {
        name
        for name, value in zip(items[::3], items[2::3], strict=False)
        if value not in ("unspecified", "unset")
    }
    return {name for name in converted if (git.directory / name).is_file()}


def _add_raw(git: Git, names: set[str], env: dict[str, str]) -> None:
    """Add files to the scratch index as they are here, because a run does not convert what it checks out.

    Otherwise the diff of a file under a filter would carry its pointer alone, and its contents are not on the
    remote yet. Source: dstack's runner clones with go-git, which has no filters.
    """
    # One process for all names that fit on a line.
    lines = sorted(name for name in names if "\n" not in name and not name.startswith('"'))
    listed = os.fsencode("".join(f"{name}\n" for name in lines))
    written = git.output("hash-object", "-w", "--no-filters", "--stdin-paths", env=env, stdin=listed)
    blobs = dict(zip(lines, written.decode().split(), strict=True))
    for name in names - set(lines):
        blobs[name] = git.output("hash-object", "-w", "--no-filters", "--", name, env=env).decode().strip()
    entries = _names(f"{_mode(git.directory / name)} {blob}\t{name}" for name, blob in blobs.items())
    git.output("update-index", "-z", "--index-info", env=env, stdin=entries)


def _mode(path: Path) -> str:
    return "100755" if path.stat().st_mode & 0o100 else "100644"


def _names(names: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def _scratch(git: Git, folder: Path) -> dict[str, str]:
    """Return the environment in which git writes its index and its objects into ``folder``."""
    objects = _path(git, "objects")
    index = _path(git, "index")
    (folder / "objects").mkdir()
    if index.is_file():
        shutil.copyfile(index, folder / "index")
    quoted = str(objects).replace("\\", "\\\\").replace('"', '\\"')
    return {
        "GIT_INDEX_FILE": str(folder / "index"),
        "GIT_OBJECT_DIRECTORY": str(folder / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{quoted}"',
    }


def _path(git: Git, name: str) -> Path:
    return git.directory / os.fsdecode(git.output("rev-parse", "--git-path", name)).rstrip("\n")


def _changed(git: Git, commit: str, env: dict[str, str]) -> dict[str, str]:
    """Return the tracked files that differ from the commit: A added, M, T, D deleted, U unmerged."""
    output = git.output(
        "diff", "--raw", "--no-renames", "--ignore-submodules=none", "-z", commit, "--", env=env
    )
    items = os.fsdecode(output).split("\0")
    changed: dict[str, str] = {}
    for entry, name in zip(items[::2], items[1::2], strict=False):
        old_mode, new_mode, *_, status = entry.lstrip(":").split(" ")
        if _SUBMODULE in (old_mode, new_mode):
            raise CannotCloneError(f"its submodule {name!r} has changes, which a diff cannot carry")
        if _LINK in (old_mode, new_mode):
            raise _link_refused(name)
        changed.setdefault(name, status)
    return changed


def _new(git: Git, env: dict[str, str]) -> list[str]:
    """Return the files that git does not track and nothing ignores."""
    names = _listed(git, env, "--others", "--exclude-standard")
    if (git.directory / ".dstackignore").is_file() or _listed(
        git, env, "--cached", "--others", "--exclude-standard", "--", ":(glob)**/.dstackignore"
    ):
        # Git reads one kind of ignore file at a time, so .dstackignore needs a listing of its own.
        left = set(_listed(git, env, "--others", "--exclude-per-directory=.dstackignore"))
        names = [name for name in names if name in left]
    for name in names:
        if name.endswith("/"):
            raise CannotCloneError(
                f"{name!r} in it is a Git repository of its own, which a diff cannot carry"
            )
        if (git.directory / name).is_symlink():
            raise _link_refused(name)
    return names


def _link_refused(name: str) -> CannotCloneError:
    # Source: dstack's runner (its repo/diff.go) writes a file with the link's target as its text instead.
    return CannotCloneError(f"its symbolic link {name!r} was changed, which a diff cannot carry")


def _listed(git: Git, env: dict[str, str], *options: str) -> list[str]:
    output = git.output("ls-files", "-z", *options, env=env)
    return [name for name in os.fsdecode(output).split("\0") if name]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
