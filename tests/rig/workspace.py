"""The folders of one job, which replace the container's file system."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# An upper bound for a git command on a busy machine.
_GIT_SECONDS = 60.0


class Workspace:
    """A private folder into which a container's paths are mapped, so that a job leaves nothing on this machine.

    `/x` becomes `<folder>/root/x`, `~` is `<folder>/home`; relative paths start in the working directory.
    The folders of `path` are searched for commands first.
    """

    def __init__(self, folder: Path, path: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._path = path
        self.home = folder / "home"
        self.root = folder / "root"
        for place in (self.home, self.root):
            place.mkdir(parents=True)

    def resolve(self, path: str | None, base: Path | None = None) -> Path:
        """Return the path on this machine of a path in the container."""
        if path is None or path == "":
            return base or self.root
        if path == "~" or path.startswith("~/"):
            start, relative = self.home, path[2:]
        elif path.startswith("/"):
            start, relative = self.root, path.lstrip("/")
        else:
            start, relative = base or self.root, path
        resolved = Path(os.path.normpath(start / PurePosixPath(relative)))
        if not resolved.is_relative_to(self.folder):
            raise ValueError(f"{path} leaves the folder of the job")
        return resolved

    def environment(self, sent: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the job: what the server sent, and nothing of this process."""
        path = ":".join([*map(str, self._path), _PATH])
        base = {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", "TERM": "xterm"}
        return {**base, **sent}

    def place_code(
        self, repo: Mapping[str, Any], code: bytes | None, credentials: Mapping[str, Any], target: Path
    ) -> None:
        """Place the repo where the job expects it: a tar file, or a clone with the local changes on top."""
        if repo.get("repo_type") == "remote" and credentials.get("clone_url"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._ssh_key(credentials.get("private_key")) as ssh:
                self._git([*ssh, "clone", "--quiet", credentials["clone_url"], str(target)])
            if revision := repo.get("repo_hash"):
                self._git(["-C", str(target), "checkout", "--quiet", str(revision)])
            if code:
                self._git(["-C", str(target), "apply", "--whitespace=nowarn", "-"], code)
        elif code:
            target.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(code)) as archive:
                archive.extractall(target, filter="data")

    def place_archive(self, content: bytes, target: Path) -> None:
        """Unpack an uploaded file or folder; its only top-level entry gets the name of the target."""
        staging = self.folder / "staging"
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(staging, filter="data")
        (entry,) = staging.iterdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.is_dir():
            shutil.copytree(entry, target, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, target)
        shutil.rmtree(staging)

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _ssh_key(self, private_key: str | None) -> Iterator[list[str]]:
        """Yield the options for git to log in with a key, which is removed before the job starts."""
        if private_key is None:
            yield []
            return
        path = self.folder / "clone-key"
        path.touch(mode=0o600)
        path.write_text(private_key)
        options = "-F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        yield ["-c", f"core.sshCommand=ssh -i {shlex.quote(str(path))} -o IdentitiesOnly=yes {options}"]
        path.unlink()

    def _git(self, arguments: list[str], stdin: bytes | None = None) -> None:
        subprocess.run(
            ["git", *arguments],
            input=stdin,
            env={"PATH": _PATH, "HOME": str(self.home), "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
