"""Bring a deployment's directory of the worker's machine to the machine of its flow run.

The problem: a deployment made without a Git remote names a directory (its path, or the pull step
``set_working_directory``), and ``prefect flow-run execute`` changes to that very path, which the machine of
the flow run does not have.

The idea: the directory is uploaded as the code of the run, and a link at its path leads to the code. So
Prefect finds it where the deployment says, without a change to the deployment.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

_STEP = "set_working_directory"


def directory_of(deployment: DeploymentResponse | None) -> Path | None:
    """Return the directory that a deployment's code is in; None where it is pulled from elsewhere."""
    if deployment is None:
        return None
    steps = deployment.pull_steps or []
    named = [inputs.get("directory") for step in steps for name, inputs in step.items() if _STEP in name]
    found = (named[-1] if named else None) if steps else deployment.path
    path = Path(str(found or "")).expanduser()
    return Path(os.path.normpath(path)) if path.is_absolute() else None


def place_code(repo_dir: Path, directory: Path | None) -> list[str]:
    """Return the commands that make ``directory`` lead to its place in the uploaded ``repo_dir``.

    A directory that the machine has at that path is used as it is: it may hold more than the upload.
    """
    if directory is None or not directory.is_relative_to(repo_dir):
        return []
    path, parent = shlex.quote(str(directory)), shlex.quote(str(directory.parent))
    below = directory.relative_to(repo_dir).as_posix()
    code = '"${DSTACK_REPO_DIR:-$PWD}"' + ("" if below == "." else f"/{shlex.quote(below)}")
    used = shlex.quote(f"The flow code is that of {directory} on this machine, not the uploaded one.")
    return [f"if [ -e {path} ]; then echo {used}; else mkdir -p {parent} && ln -s {code} {path}; fi"]
