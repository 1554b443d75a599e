"""Take what a checkout has beyond a commit, as a diff, without touching the user's index."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dstack_core._repo.archive import PACK_LIMIT
from dstack_core._repo.git import LOCAL_REPO, Git
from dstack_core._wire.code import Upload, biggest_of, too_big
from dstack_core.errors import ConfigurationError

_SUBMODULE = "160000"
_LINK = "120000"
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
    are. Raises ``ConfigurationError`` for changes a diff cannot carry, those of submodules, of nested
    repositories and of symbolic links, and past 256 MiB.
    """
    what = f"repo_dir: the diff of {str(git.directory)!r}"
    with tempfile.TemporaryDirectory(prefix="dstack-core-") as folder:
        env = _scratch(git, Path(folder))
        changed = _changed(git, commit, env)
        new = _new(git, env)
        sizes = [(name, _size(git.directory / name)) for name in (*changed, *new)]
        fresh = sum(size for name, size in sizes if changed.get(name, "A") == "A")
        if fresh > PACK_LIMIT:
            raise too_big(what, fresh, biggest_of(sizes), "it was not read", _WAY_OUT)
        unmerged = [name for name, status in changed.items() if status == "U"]
        names = b"".join(os.fsencode(name) + b"\0" for name in (*new, *unmerged))
        git.output("update-index", "--add", "--remove", "--replace", "-z", "--stdin", env=env, stdin=names)
        data = git.output("-c", "diff.suppressBlankEmpty=false", "diff", *_FORM, commit, "--", env=env)
    return Upload.of(what, _WAY_OUT, data, sizes) if data else None


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
    told = git.output(
        "diff", "--raw", "--no-renames", "--ignore-submodules=none", "-z", commit, "--", env=env
    )
    items = os.fsdecode(told).split("\0")
    changed: dict[str, str] = {}
    for entry, name in zip(items[::2], items[1::2], strict=False):
        old_mode, new_mode, *_, status = entry.lstrip(":").split(" ")
        if _SUBMODULE in (old_mode, new_mode):
            raise ConfigurationError(
                f"repo_dir: the submodule {name!r} of {str(git.directory)!r} has changes, which a diff "
                f"cannot carry. Commit and push them there and here, or {LOCAL_REPO}"
            )
        if _LINK in (old_mode, new_mode):
            raise _link_refused(git, name)
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
            raise ConfigurationError(
                f"repo_dir: {name!r} in {str(git.directory)!r} is a Git repository of its own, which a diff "
                f"cannot carry. Name it in .gitignore or .dstackignore, or {LOCAL_REPO}"
            )
        if (git.directory / name).is_symlink():
            raise _link_refused(git, name)
    return names


def _link_refused(git: Git, name: str) -> ConfigurationError:
    # Source: dstack's runner (its repo/diff.go) makes a file of it, with the link's target as its text.
    return ConfigurationError(
        f"repo_dir: the symbolic link {name!r} in {str(git.directory)!r} was made, changed or removed, which "
        "dstack does not take from a diff. Commit and push it, name a new one in .dstackignore, or "
        f"{LOCAL_REPO}"
    )


def _listed(git: Git, env: dict[str, str], *options: str) -> list[str]:
    told = git.output("ls-files", "-z", *options, env=env)
    return [name for name in os.fsdecode(told).split("\0") if name]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
