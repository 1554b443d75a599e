"""The volumes that a job names, and the links by which its commands reach their directories.

There is no container, so nothing can be mounted at ``/data`` of this machine. Each mount is a symbolic link
below the job's own folder, where `Workspace.local` places its path: commands find a volume below
``/workflow`` as ``./data`` and one below the container's home as ``~/data``. Every other path is below the
folder in the variable ``DSTACK_LOCAL_ROOT``. It is not set on a real machine, so ``$DSTACK_LOCAL_ROOT/data``
is right on both. A path below a mount in ``DSTACK_CHECKPOINT`` is replaced by where it is here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstack_core.local.errors import bad_request
from dstack_core.local.references import UnfilledReference, fill_in

ROOT_VARIABLE = "DSTACK_LOCAL_ROOT"
CHECKPOINT_VARIABLE = "DSTACK_CHECKPOINT"


@dataclass(frozen=True)
class Mount:
    """A volume, the directory of this machine that stands for it, and the path at which a job wants it."""

    volume: str
    directory: Path
    path: str


def job_volumes(mounts: Iterable[Mapping[str, Any]], job_num: int) -> list[dict[str, Any]]:
    """Return the mounts of one job as JSON data: names as lists, the job's number filled in.

    Raises ApiError 400 for a reference that has no value.
    """
    values = {name: str(job_num) for name in ("dstack.job_num", "dstack.node_rank")}
    found = []
    for mount in mounts:
        if "name" not in mount:
            found.append(dict(mount))
            continue
        names = [mount["name"]] if isinstance(mount["name"], str) else mount["name"]
        try:
            found.append({**mount, "name": [fill_in(name, values) for name in names]})
        except UnfilledReference as error:
            raise bad_request(str(error)) from error
    return found


def link(place: Path, directory: Path) -> None:
    """Put a link to the directory of a volume at a place; what is there moves into the volume.

    A real machine mounts a volume before it places code, so code that lies below the mount is in the volume.
    Raises OSError if a file is in the way.
    """
    if place.is_dir() and not place.is_symlink():
        shutil.copytree(place, directory, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(place)
    # A mount inside another volume left its link there.
    if not (place.is_symlink() and place.readlink() == directory):
        place.symlink_to(directory)
