"""The code of a job from git: a clone made as the runner makes it, and the diff on top of it."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_core.local.bodies import RemoteRepoCreds
from dstack_core.local.diffs import Change, parse_diff
from dstack_core.local.fragments import DiffError

# The longest time for one git command, a clone included: without it, a host that never answers would hold the
# job in its status without limit. A repository that takes more than a minute to clone needs a larger value.
_SECONDS = 60
# The runner's git applies no filters: a file has the bytes that the repository holds.
_PLAIN = "* -text !eol -filter -ident !working-tree-encoding\n"
# What git and ssh print around the cause of a failure, whatever the cause is.
_ADVICE = (
    "Warning: Permanently added",
    "fatal: Could not read from remote repository.",
    "Please make sure you have the correct access rights",
    "and the repository exists.",
)


def check_out(
    clone: RemoteRepoCreds,
    data: Mapping[str, Any],
    single_branch: bool,
    code: Path,
    home: Path,
    key_file: Path,
) -> None:
    """Clone into ``code``; raises subprocess.SubprocessError if git fails."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(home), "GIT_TERMINAL_PROMPT": "0"}
    env |= _access(clone, key_file)
    # Git copies the template into each repository that it clones, submodules included.
    template = key_file.with_name("clone-template")
    (template / "info").mkdir(parents=True)
    (template / "info" / "attributes").write_text(_PLAIN)
    env["GIT_TEMPLATE_DIR"] = str(template)

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-c", "core.autocrlf=false", *arguments],
                cwd=code, env=env, check=True, capture_output=True,
                text=True, errors="replace", timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise subprocess.SubprocessError(f"git {arguments[0]} took more than {_SECONDS} s") from None
        except subprocess.CalledProcessError as error:
            reason = _reason(error.stderr, clone.oauth_token)
            raise subprocess.SubprocessError(f"git {arguments[0]}: {reason}") from None
        return done.stdout.strip()

    branch, commit = data["repo_branch"], data["repo_hash"]
    options = ["--branch", branch, *(["--single-branch"] if single_branch else [])] if branch else []
    git("clone", "--quiet", "--no-checkout", *options, "--", clone.clone_url, ".")
    # Stay on the branch if the wanted commit is its head, else check out the commit alone.
    on_branch = not commit or (branch and commit == git("rev-parse", "HEAD"))
    if git("ls-tree", "--name-only", "HEAD", ".gitmodules"):
        # Like the runner: clone the submodules of the branch, and leave them there for another commit.
        git("checkout", "--quiet")
        git("submodule", "--quiet", "update", "--init", "--recursive")
        remove = 'rm -f "$(git rev-parse --git-dir)/info/attributes"'
        git("submodule", "--quiet", "foreach", "--recursive", remove)
    git("checkout", "--quiet", *([] if on_branch else ["--detach", commit]))
    (code / ".git" / "info" / "attributes").unlink()
    shutil.rmtree(template)
    key_file.unlink(missing_ok=True)
    for key in ("name", "email"):
        if (value := data[f"repo_config_{key}"]) is not None:
            git("config", f"user.{key}", value)


def apply_diff(diff: bytes, directory: Path) -> None:
    """Apply a diff to the files of a directory; raises DiffError if it does not fit them exactly."""
    for change in parse_diff(diff + b"\n"):
        _apply(change, directory)


def _place(directory: Path, name: bytes) -> Path:
    path = directory / os.fsdecode(name)
    if not path.resolve().is_relative_to(directory.resolve()):
        raise DiffError(f"{os.fsdecode(name)} leads out of the repository")
    return path


def _apply(change: Change, directory: Path) -> None:
    old = _place(directory, change.old_name) if change.old_name else None
    shown = os.fsdecode(change.old_name or change.new_name)
    try:
        content = old.read_bytes() if old is not None else b""
        result = change.apply(content)
        if not change.is_delete:
            new = _place(directory, change.new_name)
            if change.is_new or change.is_rename:
                new.parent.mkdir(parents=True, exist_ok=True)
            mode = change.new_mode or change.old_mode or (old.stat().st_mode if old is not None else 0o644)
            new.write_bytes(result)
            new.chmod(mode & 0o777)
    except DiffError as error:
        raise DiffError(f"diff applier error for file {shown}: {error}") from error
    except OSError as error:
        raise DiffError(f"file {shown}: {error.strerror}") from error
    if old is not None and (change.is_delete or change.is_rename):
        old.unlink(missing_ok=True)


def _access(clone: RemoteRepoCreds, key_file: Path) -> dict[str, str]:
    """Return the variables that pass the secrets of a clone to git; other users can read a command line."""
    if clone.oauth_token is not None:
        login = base64.b64encode(f"anything:{clone.oauth_token}".encode()).decode()
        # Only for the host of the clone: a submodule on another host must not get the token.
        host = re.sub(r"^(\w+://)(?:[^/]*@)?([^/]*).*", r"\1\2/", clone.clone_url)
        return {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"http.{host}.extraHeader",
            "GIT_CONFIG_VALUE_0": f"Authorization: Basic {login}",
        }
    if clone.private_key is not None:
        key_file.touch(mode=0o600)
        key_file.write_text(clone.private_key)
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        return {"GIT_SSH_COMMAND": f"ssh -i {shlex.quote(str(key_file))} -o IdentitiesOnly=yes {options}"}
    return {}


def _reason(text: str, token: str | None) -> str:
    """Return the line of git's errors that names the cause, without the secrets of a URL."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_ADVICE)]
    errors = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    line = (errors or lines or ["fatal: Could not read from remote repository."])[-1]
    line = re.sub(r"://[^/\s]*@", "://", line)
    return line.replace(token, "***") if token else line
