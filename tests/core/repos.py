"""Real Git repositories for the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_ENV = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@b.c",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@b.c",
}
_OPTIONS = ("-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always")


REMOTE = "https://git.example/o/origin.git"


def git(directory: Path, *arguments: str, stdin: bytes = b"") -> str:
    """Run git without this machine's configuration and return its output."""
    done = subprocess.run(
        ["git", *_OPTIONS, *arguments], cwd=directory, env=_ENV, input=stdin, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return os.fsdecode(done.stdout).strip()


def write(root: Path, **files: str) -> None:
    """Write files; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def commit(root: Path, message: str = "m") -> str:
    """Commit everything and return the commit's hash."""
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def clone_pair(folder: Path, name: str = "work") -> Path:
    """Return a checkout with one commit that is also on its remote.

    The remote is `origin.git` beside it, under an address that a run could clone.
    """
    git(folder, "init", "--quiet", "--bare", "origin.git")
    git(folder, "clone", "--quiet", f"file://{folder}/origin.git", name)
    work = folder / name
    git(work, "remote", "set-url", "origin", REMOTE)
    git(work, "config", f"url.file://{folder}/origin.git.insteadOf", REMOTE)
    git(work, "symbolic-ref", "HEAD", "refs/heads/main")
    write(work, a="1\n", b="2\n", sub__c="3\n")
    commit(work)
    git(work, "push", "--quiet", "-u", "origin", "main")
    return work


def tree(root: Path) -> dict[str, tuple[str, bytes]]:
    """Return every file below a directory, except `.git`, with its kind and its content."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if ".git" in Path(name).parts or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            found[name] = ("link", os.fsencode(path.readlink()))
        else:
            found[name] = ("exec" if path.stat().st_mode & 0o100 else "file", path.read_bytes())
    return found
