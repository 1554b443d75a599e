"""Ask the ``git`` binary what a checkout is: its remote, its branch, the commit a run can clone."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._code.remote import CannotCloneError, Remote
from dstack_core.errors import ConfigurationError

_SECRET = re.compile(r"://[^/@\s]+@")
# A caller inside a git hook has these set for another repository.
_FOREIGN = frozenset(
    {
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_PREFIX",
        "GIT_COMMON_DIR",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_EXTERNAL_DIFF",
        "GIT_DIFF_OPTS",
    }
)
# Nothing may prompt, take locks of the user's, run hooks, or speak another language than English.
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
_OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.splitIndex=false")


@dataclass(frozen=True, slots=True)
class Git:
    """Run ``git`` in one directory, the top of a checkout; what is above it is not looked at."""

    directory: Path

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Return the finished process, whatever its status; raises ``CannotCloneError`` without git."""
        own = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        try:
            return subprocess.run(
                ["git", *_OPTIONS, *arguments],
                cwd=self.directory,
                env={**own, **_QUIET, "GIT_CEILING_DIRECTORIES": str(self.directory.parent), **(env or {})},
                input=stdin,
                capture_output=True,
                check=False,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise CannotCloneError("there is no git on the PATH") from None

    def output(self, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> bytes:
        """Return what git printed; raises ``CannotCloneError`` when it fails."""
        done = self.run(*arguments, env=env, stdin=stdin)
        if done.returncode != 0:
            raise self.refusal(done)
        return done.stdout

    def line(self, *arguments: str) -> str | None:
        """Return the one line git printed, None when it failed or printed nothing."""
        done = self.run(*arguments)
        return (os.fsdecode(done.stdout).strip("\n") or None) if done.returncode == 0 else None

    def refusal(self, done: subprocess.CompletedProcess[bytes]) -> CannotCloneError:
        """Return the error for a git command that failed."""
        # What follows the first line is advice for a terminal.
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0].removeprefix("fatal: ")
        reason = _SECRET.sub("://***@", reason)[:300] or f"exit status {done.returncode}"
        return CannotCloneError(f"git cannot read it ({reason})")

    def tracked(self) -> frozenset[Path]:
        """Return the files that git tracks and the directories they lie in; nothing when git does not say."""
        try:
            listed = self.output("ls-files", "-z")
        except CannotCloneError:
            return frozenset()
        files = [self.directory / name for name in os.fsdecode(listed).split("\0") if name]
        return frozenset(folder for file in files for folder in (file, *file.parents))


@dataclass(frozen=True, slots=True)
class Checkout:
    """What a run needs to have the same commit."""

    remote: Remote
    branch: str
    commit: str
    author: Mapping[str, str] = field(default_factory=dict)


def is_top_of_repository(directory: Path) -> bool:
    """Tell whether the directory is the top of a Git checkout; one below the top is a plain directory.

    Raises ``ConfigurationError`` for a bare repository, and ``CannotCloneError`` for one that git does not
    read: of another owner, or a worktree whose repository is not there.
    """
    git = Git(directory)
    if not (directory / ".git").exists():
        if (directory / "HEAD").is_file() and all(
            (directory / name).is_dir() for name in ("objects", "refs")
        ):
            raise ConfigurationError(
                "repo_dir: expected a directory with files, got the bare Git repository "
                f"{str(directory)!r}. Pass a clone of it."
            )
        return False
    done = git.run("rev-parse", "--is-inside-work-tree")
    if done.returncode != 0 or done.stdout.strip() != b"true":
        raise git.refusal(done)
    return True


def read_checkout(git: Git) -> Checkout:
    """Return the remote, one of its branches, and the newest commit of HEAD's history that this branch has.

    Commits that were not pushed are part of the diff against that commit. Raises ``CannotCloneError`` when no
    branch of a remote is known to have any of it.
    """
    if git.line("rev-parse", "--verify", "--quiet", "HEAD") is None:
        raise CannotCloneError("it has no commit")
    branch = git.line("symbolic-ref", "--quiet", "--short", "HEAD")
    remotes = (git.line("remote") or "").split("\n")
    tracked = _tracked(git, branch)
    remote = tracked[0] if tracked else "origin" if "origin" in remotes else remotes[0]
    if not remote:
        raise CannotCloneError("it has no remote")
    name = commit = None
    if tracked:
        _, ref, name = tracked
        # None where the branch was deleted over there, or where a shallow clone does not know the way.
        commit = git.line("merge-base", "HEAD", ref)
    if name is None or commit is None:
        name, commit = _pushed(git, remote, branch)
    return _true_checkout(git.directory, _url(git, remote), name, commit)


def _tracked(git: Git, branch: str | None) -> tuple[str, str, str] | None:
    """Return the remote, the local ref and the name of the branch that the current one tracks."""
    if branch is None:
        return None
    fields = "%(upstream)%00%(upstream:remotename)%00%(upstream:remoteref)"
    output = git.line("for-each-ref", f"--format={fields}", f"refs/heads/{branch}") or ""
    ref, _, rest = output.partition("\0")
    remote, _, name = rest.partition("\0")
    if not ref or remote in ("", "."):
        return None
    return remote, ref, name.removeprefix("refs/heads/")


def _pushed(git: Git, remote: str, branch: str | None) -> tuple[str, str]:
    """Return a branch of the remote and its newest commit in HEAD's history.

    For a detached HEAD, a branch that was not pushed, and the checkouts of CI: a tag or a merge that no
    branch has may be all there is, and then there is nothing to clone.
    """
    prefix = f"refs/remotes/{remote}/"
    if git.line("for-each-ref", "--count=1", prefix) is None:
        raise CannotCloneError(f"no branch of its remote {remote!r} is known here")
    beyond = git.line("rev-list", "--boundary", "--first-parent", "HEAD", "--not", f"--remotes={remote}")
    commit = "HEAD"
    if beyond is not None:
        pushed = [line[1:] for line in beyond.split("\n") if line.startswith("-")]
        if not pushed:
            raise CannotCloneError(f"no branch of its remote {remote!r} is known to have its commits")
        commit = pushed[-1]
    ref = _having(git, commit, prefix, branch)
    full = git.line("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if ref is None or full is None:
        raise CannotCloneError(f"no branch of its remote {remote!r} is known to have its commits")
    return ref.removeprefix(prefix), full


def _having(git: Git, commit: str, prefix: str, branch: str | None) -> str | None:
    """Return a branch below ``prefix`` that has the commit: of that name, the default, else the first."""
    default = git.line("symbolic-ref", "--quiet", f"{prefix}HEAD")
    having = git.line("for-each-ref", "--contains", commit, "--format=%(refname)", prefix) or ""
    found = [ref for ref in having.split("\n") if ref and ref != f"{prefix}HEAD"]
    preferred = [ref for ref in (f"{prefix}{branch}", default) if ref is not None and ref in found]
    return next(iter(preferred + found), None)


def _url(git: Git, remote: str) -> str:
    """Return the address of a remote as it was configured.

    What ``insteadOf`` makes of it is for this machine; it counts only where nothing else is an address.
    """
    urls = git.line("config", "--get-all", f"remote.{remote}.url") or ""
    written = urls.split("\n")[0]
    if written.startswith(("https://", "ssh://", "git@")):
        return written
    return git.line("remote", "get-url", remote) or written


def _true_checkout(directory: Path, url: str, branch: str, commit: str) -> Checkout:
    """Follow remotes on this disk, such as the bare mirror behind Airflow's bundles, to where they lead.

    A mirror has the branches of its own remote as its own. Any other repository may have commits that were
    never pushed, so there a branch of its remote must have the commit.
    """
    remote = Remote.parse(url, directory)
    visited = {directory}
    while remote.scheme == "file":
        local = f"its remote is the local path {str(remote.directory)!r}"
        if remote.directory in visited or not remote.directory.is_dir():
            raise CannotCloneError(local)
        visited.add(remote.directory)
        there = Git(remote.directory)
        url = _url(there, "origin")
        if not url:
            raise CannotCloneError(local)
        if there.line("rev-parse", "--is-bare-repository") != "true":
            ref = _having(there, commit, "refs/remotes/origin/", branch)
            if ref is None:
                raise CannotCloneError(f"{local}, which has commits that were not pushed")
            branch = ref.removeprefix("refs/remotes/origin/")
        remote = Remote.parse(url, remote.directory)
    return Checkout(remote, branch, commit, _author(Git(directory)))


def _author(git: Git) -> dict[str, str]:
    """Return who commits here, ``name`` and ``email`` where they are set: a run's commits are by the same."""
    output = git.run("config", "--null", "--get-regexp", r"^user\.(name|email)$").stdout
    pairs = [item.partition("\n") for item in os.fsdecode(output).split("\0") if item]
    return {key.removeprefix("user."): value for key, _, value in pairs}
