"""Take what a checkout has beyond a commit, as a diff, without touching the user's index."""

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
# The attributes of a file whose blob differs from the file by more than its line ends.
_CONVERSIONS = ("filter", "working-tree-encoding", "ident")
_WAY_OUT = (
    "Name new files the run does not need in .gitignore or .dstackignore, or commit and push what is big"
)
# Whatever the user's configuration says, the diff has the form that every server applies.
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
    """Return the diff between ``commit`` and the files as they are, None when there is no difference.

    Staged, unstaged and unpushed changes and new files are in it; what ``.gitignore`` names, and new
    files that ``.dstackignore`` names, are not. The index and the objects of the repository stay as they
    are. Raises ``CannotCloneError`` for changes a diff cannot carry: those of submodules, of nested
    repositories and of symbolic links, and a directory that became a file. Raises ``ConfigurationError``
    past 256 MiB.
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
        fresh = sum(size for name, size in sizes if name in raw or changed.get(name, "A") == "A")
        if fresh > PACK_LIMIT:
            raise too_big(what, fresh, biggest_of(sizes), "it was not read", _WAY_OUT)
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
    """Return the files that git keeps in another form than they have here, such as those of Git LFS."""
    output = git.output("check-attr", "-z", "--stdin", *_CONVERSIONS, env=env, stdin=_names(names))
    items = os.fsdecode(output).split("\0")
    converted = {
        name
        for name, value in zip(items[::3], items[2::3], strict=False)
        if value not in ("unspecified", "unset")
    }
    return {name for name in converted if (git.directory / name).is_file()}


def _add_raw(git: Git, names: set[str], env: dict[str, str]) -> None:
    """Put files into the scratch index as they are here: a run does not convert what it checks out.

    Of a file under a filter the diff would else carry the pointer alone, and its contents are not on the
    remote yet. Source: dstack's runner clones with go-git, which knows no filters.
    """
    # One process for all names that can be written on a line.
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
    """Return the files that git does not know and nothing ignores."""
    names = _listed(git, env, "--others", "--exclude-standard")
    if (git.directory / ".dstackignore").is_file() or _listed(
        git, env, "--cached", "--others", "--exclude-standard", "--", ":(glob)**/.dstackignore"
    ):
        # Git reads one kind of ignore file at a time.
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
    # Source: dstack's runner (its repo/diff.go) makes a file of it, with the link's target as its text.
    return CannotCloneError(f"its symbolic link {name!r} was changed, which a diff cannot carry")


def _listed(git: Git, env: dict[str, str], *options: str) -> list[str]:
    output = git.output("ls-files", "-z", *options, env=env)
    return [name for name in os.fsdecode(output).split("\0") if name]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
