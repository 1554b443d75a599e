"""The directory of one job: its code, its files and its environment.

There is no container, so the paths of a container are mapped into a directory of this machine, and nothing
may be written outside it. Paths leave the directory in three ways, each closed where it could happen:

* ``..`` in a path: `Workspace.local` normalizes it and compares.
* A symbolic link in the code, on the way to a directory: `Workspace._make` resolves it and compares. Links to
  the job's volumes may be followed.
* A symbolic link in an archive through which a later entry of the archive is written: `_unpack` creates the
  links last.

Commands are not confined: they have the rights of the caller and may follow any link.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dstack_core.local.bodies import RemoteRepoCreds
from dstack_core.local.checkout import apply_diff, check_out
from dstack_core.local.fragments import DiffError
from dstack_core.local.mounts import CHECKPOINT_VARIABLE, ROOT_VARIABLE, Mount, link
from dstack_core.local.runs import Job, Run

ADDRESS = "127.0.0.1"
_CODE_DIR = "/workflow"


class WorkspaceError(Exception):
    """The failure to place the code or files of a job; `reason` is the job's termination reason."""

    def __init__(self, message: str, reason: str = "container_exited_with_error") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Sources:
    """The uploads that a job needs: the code of its repo, how to clone it, its file archives."""

    code: Path | None = None
    clone: RemoteRepoCreds | None = None
    archives: list[tuple[Path, str]] = field(default_factory=list)


class Workspace:
    """A directory of this machine that stands for the file system of a container.

    ``/workflow`` becomes ``<root>/workflow``, ``~`` and the container's home become ``<root>/home`` and any
    other absolute path lies below ``<root>/rootfs``. The image's own working directory is ``/workflow``.
    """

    def __init__(self, root: Path, spec: Mapping[str, Any], mounts: Sequence[Mount] = ()) -> None:
        self.root = root
        self.mounts = mounts
        self.home = root / "home"
        self._home_dir = spec["home_dir"]
        self.cwd = self.local(spec["working_dir"] or _CODE_DIR)
        self.code = self.local(spec["repo_dir"], self.cwd)

    def local(self, path: str, base: Path | None = None) -> Path:
        """Return the local path of a container's path; a relative one starts at ``base``, else ``/workflow``.

        Raises WorkspaceError if it leads out of the job's directory.
        """
        workflow = self.root / "workflow"
        for prefix, folder in ((_CODE_DIR, workflow), ("~", self.home), (self._home_dir, self.home)):
            if path == prefix or path.startswith(prefix.rstrip("/") + "/"):
                place = folder / path[len(prefix) :].strip("/")
                break
        else:
            pure = PurePosixPath(path)
            place = (
                self.root / "rootfs" / pure.relative_to("/")
                if pure.is_absolute()
                else (base or workflow) / pure
            )
        place = Path(os.path.normpath(place))
        if not place.is_relative_to(self.root):
            raise WorkspaceError(f"The path {path} leads out of the job's directory")
        return place

    def prepare(self, sources: Sources, spec: Mapping[str, Any]) -> None:
        """Place code and files; raises WorkspaceError if an archive is unsafe or broken, or git fails."""
        for directory in (self.code, self.home):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            self._place_code(sources, spec)
        except (tarfile.TarError, OSError, subprocess.SubprocessError, DiffError) as error:
            raise WorkspaceError(f"Failed to set up the repo ({error})") from error
        self._mount()
        try:
            for archive, path in sources.archives:
                self._place(archive, path)
        except (tarfile.TarError, OSError, WorkspaceError) as error:
            raise WorkspaceError(f"Failed to set up files ({error})", "executor_error") from error
        # A link in the code may lead to a directory of this machine; commands may start there.
        if not self.cwd.is_dir():
            self._make(self.cwd)

    def _mount(self) -> None:
        """Link the volumes; raises WorkspaceError if something is in the way."""
        for mount in self.mounts:
            below_root = self.root / "rootfs" / PurePosixPath(mount.path).relative_to("/")
            for place in dict.fromkeys((self.local(mount.path), below_root)):
                try:
                    self._make(place.parent)
                    link(place, mount.directory)
                except OSError as error:
                    raise WorkspaceError(
                        f"prepareVolumes error: {mount.path}: {error}", "executor_error"
                    ) from error

    def _make(self, directory: Path) -> None:
        """Create a directory; raises WorkspaceError if links on the way lead out of the job's directory."""
        roots = [self.root, *(mount.directory for mount in self.mounts)]
        if not any(directory.resolve().is_relative_to(root.resolve()) for root in roots):
            raise WorkspaceError(f"The path {directory} leads out of the job's directory")
        directory.mkdir(parents=True, exist_ok=True)

    def _place_code(self, sources: Sources, spec: Mapping[str, Any]) -> None:
        if spec["repo_data"]["repo_type"] != "remote":
            if sources.code is not None:
                _unpack(sources.code, self.code)
            return
        if sources.clone is None:
            return
        key_file = self.root / "clone-key"
        check_out(sources.clone, spec["repo_data"], spec["single_branch"], self.code, self.home, key_file)
        if sources.code is not None:
            apply_diff(sources.code.read_bytes(), self.code)

    def _place(self, archive: Path, path: str) -> None:
        target = self.local(path, self.cwd)
        unpacked = self.root / "unpacked"
        _unpack(archive, unpacked)
        entries = list(unpacked.iterdir())
        if len(entries) != 1:
            raise WorkspaceError(f"The archive for {path} must have exactly one top-level entry")
        self._make(target.parent)
        # Replace what exists, as the runner of the real server does.
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        shutil.move(entries[0], target)
        shutil.rmtree(unpacked)

    def environment(self, run: Run, job: Job, variables: Mapping[str, str], marker: str) -> dict[str, str]:
        """Return the environment of the job, with only PATH from the server's own (PROTOCOL 1.8, samples).

        `variables` are those of the job, with the values of secrets.
        """
        peers = [peer for peer in run.jobs if peer.spec["replica_num"] == job.spec["replica_num"]]
        machine = job.latest.provisioning_data or {}
        gpus = len(machine["instance_type"]["resources"]["gpus"])
        name, _, value = marker.partition("=")
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            **({ROOT_VARIABLE: str(self.root / "rootfs")} if self.mounts else {}),
            **variables,
            **self._checkpoint(variables.get(CHECKPOINT_VARIABLE)),
            "DSTACK_RUN_NAME": run.name,
            "DSTACK_RUN_ID": run.id,
            "DSTACK_JOB_ID": job.latest.id,
            "DSTACK_REPO_ID": run.spec.repo_id or "none",
            "DSTACK_REPO_DIR": str(self.code),
            "DSTACK_WORKING_DIR": str(self.cwd),
            "DSTACK_NODE_RANK": str(job.spec["job_num"]),
            "DSTACK_NODES_NUM": str(len(peers)),
            "DSTACK_NODES_IPS": "\n".join(ADDRESS for _ in peers),
            "DSTACK_MASTER_NODE_IP": ADDRESS,
            "DSTACK_GPUS_PER_NODE": str(gpus),
            "DSTACK_GPUS_NUM": str(gpus * len(peers)),
            name: value,
        }

    def _checkpoint(self, path: str | None) -> dict[str, str]:
        """Return where the directory of the run's checkpoints is on this machine."""
        pure = PurePosixPath(path or "")
        if ".." in pure.parts or not any(pure.is_relative_to(mount.path) for mount in self.mounts):
            return {}
        return {CHECKPOINT_VARIABLE: str(self.local(str(pure)))}


def _unpack(archive: Path, directory: Path) -> None:
    """Unpack into a new directory; links may lead anywhere, as in a container.

    Links are created last, the deepest first, so nothing in the archive is ever written through one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        links = {_inside(directory, member.name): member.linkname for member in tar if member.issym()}
        others = [member for member in tar if not member.issym()]
        for member in others:
            # For such a hard link, tarfile would make the symbolic link that it names, and too early.
            if member.islnk() and _inside(directory, member.linkname) in links:
                raise tarfile.TarError(f"{member.name!r} is a hard link to a symbolic link")
            _confine(directory, member)
        # The first Pythons that are supported, Debian's among them, have no such filter.
        tar.extraction_filter = getattr(tarfile, "data_filter", None) or _unchanged
        tar.extractall(directory, others)  # noqa: S202 - each entry was checked, above
    for place in sorted(links, key=lambda place: len(place.parts), reverse=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(links[place])


def _confine(directory: Path, member: tarfile.TarInfo) -> None:
    """Keep an entry inside the directory, without an owner or special rights; refuse devices and pipes."""
    if not (member.isreg() or member.isdir() or member.islnk()):
        raise tarfile.TarError(f"{member.name!r} is neither a file, a directory nor a link")
    # ``tarfile`` joins these with the directory, so an absolute one would lead out of it.
    member.name = str(_inside(directory, member.name).relative_to(directory))
    if member.islnk():
        member.linkname = str(_inside(directory, member.linkname).relative_to(directory))
    member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
    member.mode = 0o755 if member.isdir() else member.mode & 0o755 | 0o600


def _unchanged(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    return member


def _inside(directory: Path, name: str) -> Path:
    place = Path(os.path.normpath(directory / name.lstrip("/")))
    if not place.is_relative_to(directory):
        raise tarfile.TarError(f"{name!r} leads out of the directory")
    return place
