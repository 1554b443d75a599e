"""Ask the ``git`` binary what a checkout is: its remote, its branch, the commit a run can clone."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core.errors import ConfigurationError

LOCAL_REPO = "pass local_repo=True to upload the directory's contents instead"
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
        """Return the finished process, whatever its status; raises ``ConfigurationError`` without git."""
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
            raise ConfigurationError(
                f"repo_dir: {str(self.directory)!r} is a Git repository and there is no git on the PATH; "
                f"install it, or {LOCAL_REPO}"
            ) from None

    def output(self, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> bytes:
        """Return what git printed; raises ``ConfigurationError`` when it fails."""
        done = self.run(*arguments, env=env, stdin=stdin)
        if done.returncode != 0:
            raise self.refusal(done)
        return done.stdout

    def line(self, *arguments: str) -> str | None:
        """Return the one line git printed, None when it failed or printed nothing."""
        done = self.run(*arguments)
        return (os.fsdecode(done.stdout).strip("\n") or None) if done.returncode == 0 else None

    def refusal(self, done: subprocess.CompletedProcess[bytes]) -> ConfigurationError:
        """Return the error for a git command that failed."""
        told = _SECRET.sub("://***@", " ".join(done.stderr.decode(errors="replace").split()))[:300]
        return ConfigurationError(
            f"repo_dir: git cannot read {str(self.directory)!r}: {told or f'exit status {done.returncode}'}. "
            f"Make it readable for git, or {LOCAL_REPO}"
        )


@dataclass(frozen=True, slots=True)
class Checkout:
    """Hold what a run needs to have the same commit; the remote's address may hold a secret."""

    remote_url: str = field(repr=False)
    branch: str
    commit: str


def is_top_of_repository(directory: Path) -> bool:
    """Tell whether the directory is the top of a Git checkout; one below the top is a plain directory.

    Raises ``ConfigurationError`` for a bare repository, and for one that git refuses to read.
    """
    git = Git(directory)
    if not (directory / ".git").exists():
        if (directory / "HEAD").is_file() and all(
            (directory / name).is_dir() for name in ("objects", "refs")
        ):
            raise ConfigurationError(
                f"repo_dir: {str(directory)!r} is a bare Git repository, without files; name a clone of it"
            )
        return False
    done = git.run("rev-parse", "--is-inside-work-tree")
    if done.returncode != 0 or done.stdout.strip() != b"true":
        raise git.refusal(done)
    return True


def read_checkout(git: Git) -> Checkout:
    """Return the remote, its branch, and the newest commit of HEAD's history that this branch has.

    Commits that were not pushed are part of the diff against that commit. Raises ``ConfigurationError``
    when no remote branch is known to have any of it.
    """
    where = f"repo_dir: {str(git.directory)!r}"
    if git.line("rev-parse", "--verify", "--quiet", "HEAD") is None:
        raise ConfigurationError(
            f"{where} is a Git repository without a commit. Commit and push (git push -u origin BRANCH), "
            f"or {LOCAL_REPO}"
        )
    branch = git.line("symbolic-ref", "--quiet", "--short", "HEAD")
    remote, ref, name = _tracked(git, branch) or _containing(git, branch, where)
    url = git.line("remote", "get-url", remote)
    commit = git.line("merge-base", "HEAD", ref)
    if url is None or commit is None:
        raise ConfigurationError(
            f"{where}: {ref} is not there or has no commit in common with HEAD (a shallow clone may not know "
            f"it). Run git fetch or git push -u {remote} {name}, or {LOCAL_REPO}"
        )
    return Checkout(url, name, commit)


def _tracked(git: Git, branch: str | None) -> tuple[str, str, str] | None:
    """Return the remote, the local ref and the name of the branch that the current one tracks."""
    if branch is None:
        return None
    fields = "%(upstream)%00%(upstream:remotename)%00%(upstream:remoteref)"
    told = git.line("for-each-ref", f"--format={fields}", f"refs/heads/{branch}") or ""
    ref, _, rest = told.partition("\0")
    remote, _, name = rest.partition("\0")
    if not ref or remote in ("", "."):
        return None
    return remote, ref, name.removeprefix("refs/heads/")


def _containing(git: Git, branch: str | None, where: str) -> tuple[str, str, str]:
    """Return a branch of the remote that has HEAD itself: for a detached HEAD or a new branch."""
    remotes = (git.line("remote") or "").split("\n")
    remote = "origin" if "origin" in remotes else remotes[0]
    state = f"the branch {branch!r} has no tracking branch" if branch else "its HEAD is detached"
    push = f"git push -u {remote or 'origin'} {branch or 'HEAD:refs/heads/BRANCH'}"
    if not remote:
        raise ConfigurationError(
            f"{where} is a Git repository without a remote, so a run cannot clone it. Add one and push (git "
            f"remote add origin URL; {push}), or {LOCAL_REPO}"
        )
    prefix = f"refs/remotes/{remote}/"
    default = git.line("symbolic-ref", "--quiet", f"{prefix}HEAD")
    having = git.line("for-each-ref", "--contains", "HEAD", "--format=%(refname)", prefix) or ""
    found = [ref for ref in having.split("\n") if ref and ref != f"{prefix}HEAD"]
    if not found:
        raise ConfigurationError(
            f"{where}: {state}, and no branch of the remote {remote!r} is known to have its newest commit. "
            f"Push it ({push}), or {LOCAL_REPO}"
        )
    preferred = [ref for ref in (f"{prefix}{branch}", default) if ref is not None and ref in found]
    ref = (preferred + found)[0]
    return remote, ref, ref.removeprefix(prefix)
