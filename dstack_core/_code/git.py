"""What the ``git`` binary knows of a checkout: its remote, its branch, and the commit that a run can clone.

The problem: the run clones from the remote, so it can only start from a commit that the remote has. What is
checked out here may be a detached HEAD, a branch that was never pushed, a merge that CI made, or a clone of a
mirror on this very disk, as Airflow's bundles are.

The idea: take the newest commit of HEAD's history that a branch of the remote is known to have here.
Everything beyond it travels as a diff (``diff``). No command here contacts the remote, so nothing waits or
asks for a password; what is known of the remote is as of the last fetch.

Invariant: git runs without prompts, hooks, the user's locks, and without the environment of another
repository.
"""

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
# A caller inside a git hook has these variables set for another repository.
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
# Nothing may prompt, take the user's locks or run hooks, and messages are in English, because errors quote
# them.
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
_OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.splitIndex=false")


@dataclass(frozen=True, slots=True)
class Git:
    """The ``git`` binary in one directory, the top of a checkout; repositories above it do not count."""

    directory: Path

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git and return the finished process, whatever its status.

        Args:
            *arguments: The command and its options.
            env: Variables to add to the environment.
            stdin: What git reads.

        Raises:
            CannotCloneError: There is no git.
        """
        own = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        try:
            return subprocess.run(
                ["git", *_OPTIONS, *arguments],
                cwd=self.directory,
                env={**own, **_QUIET, "GIT_CEILING_DIRECTORIES": str(self.directory.parent), **(env or {})},
                input=stdin,
                capture_output=True,
                check=False,
                # In a session of its own, so that a Ctrl-C for the caller does not end git in the middle.
                start_new_session=True,
            )
        except FileNotFoundError:
            raise CannotCloneError("there is no git on the PATH") from None

    def output(self, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> bytes:
        """Return what git printed. Raises ``CannotCloneError`` if it fails."""
        done = self.run(*arguments, env=env, stdin=stdin)
        if done.returncode != 0:
            raise self.refusal(done)
        return done.stdout

    def line(self, *arguments: str) -> str | None:
        """Return the one line that git printed, None if it failed or printed nothing."""
        done = self.run(*arguments)
        return (os.fsdecode(done.stdout).strip("\n") or None) if done.returncode == 0 else None

    def refusal(self, done: subprocess.CompletedProcess[bytes]) -> CannotCloneError:
        """Return the error for a git command that failed."""
        # The lines after the first are advice for a terminal.
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0].removeprefix("fatal: ")
        reason = _SECRET.sub("://***@", reason)[:300] or f"exit status {done.returncode}"
        return CannotCloneError(f"git cannot read it ({reason})")

    def tracked(self) -> frozenset[Path]:
        """Return the files that git tracks and the directories they lie in; nothing if git fails."""
        try:
            listed = self.output("ls-files", "-z")
        except CannotCloneError:
            return frozenset()
        files = [self.directory / name for name in os.fsdecode(listed).split("\0") if name]
        return frozenset(folder for file in files for folder in (file, *file.parents))


@dataclass(frozen=True, slots=True)
class Checkout:
    """What a run needs to start from the same commit: where it clones from, and the commit itself."""

    remote: Remote
    branch: str
    commit: str
    author: Mapping[str, str] = field(default_factory=dict)


def is_top_of_repository(directory: Path) -> bool:
    """Return whether the directory is the top of a Git checkout; one below the top is a plain directory.

    Raises ``ConfigurationError`` for a bare repository, and ``CannotCloneError`` for one that git does not
    read: of another owner, or a worktree whose repository does not exist.
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

    Commits that were not pushed are part of the diff against that commit. Raises ``CannotCloneError`` if no
    branch of a remote is known to have any of that history.
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
        # None if the branch was deleted on the remote, or if a shallow clone does not reach back far enough.
        commit = git.line("merge-base", "HEAD", ref)
    if name is None or commit is None:
        name, commit = _pushed(git, remote, branch)
    return _true_checkout(git.directory, _url(git, remote), name, commit)


def _tracked(git: Git, branch: str | None) -> tuple[str, str, str] | None:
    """Return the remote, the local ref and the name of the branch that the current branch tracks."""
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

    This is for a detached HEAD, a branch that was not pushed, and the checkouts of CI. Those may have only a
    tag or a merge that no branch has, and then there is nothing to clone.
    """
    prefix = f"refs/remotes/{remote}/"
    if git.line("for-each-ref", "--count=1", prefix) is None:
        raise CannotCloneError(f"no branch of its remote {remote!r} is known here")
    # The commits that no branch of the remote has, and with a minus sign the first ones that some branch has.
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
    """Return a branch below ``prefix`` that has the commit: ``branch``, else the default, else the first."""
    default = git.line("symbolic-ref", "--quiet", f"{prefix}HEAD")
    having = git.line("for-each-ref", "--contains", commit, "--format=%(refname)", prefix) or ""
    found = [ref for ref in having.split("\n") if ref and ref != f"{prefix}HEAD"]
    preferred = [ref for ref in (f"{prefix}{branch}", default) if ref is not None and ref in found]
    return next(iter(preferred + found), None)


def _url(git: Git, remote: str) -> str:
    """Return the address of a remote as it was configured.

    What ``insteadOf`` makes of it is for this machine. It counts only if the configured text is not an
    address by itself.
    """
    urls = git.line("config", "--get-all", f"remote.{remote}.url") or ""
    written = urls.split("\n")[0]
    if written.startswith(("https://", "ssh://", "git@")):
        return written
    return git.line("remote", "get-url", remote) or written


def _true_checkout(directory: Path, url: str, branch: str, commit: str) -> Checkout:
    """Return the checkout with its true remote: a remote on this disk is followed to its own remote.

    Such a remote is the bare mirror behind Airflow's bundles. A mirror has the branches of its own remote as
    its own. Any other repository may have commits that were never pushed, so there a branch of its remote
    must have the commit.
    """
    remote = Remote.parse(url, directory)
    # Two repositories can be each other's remote.
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
    """Return who commits here, ``name`` and ``email`` if they are set, for commits that the run makes."""
    output = git.run("config", "--null", "--get-regexp", r"^user\.(name|email)$").stdout
    pairs = [item.partition("\n") for item in os.fsdecode(output).split("\0") if item]
    return {key.removeprefix("user."): value for key, _, value in pairs}
