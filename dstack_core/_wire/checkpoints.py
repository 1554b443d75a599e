"""The directory in which all attempts of a run keep their checkpoints: ``$DSTACK_CHECKPOINT``.

The problem: an attempt begins on another machine, at the first command. Only what is on a volume is still
there. Runs may share a volume, and a later try of an engine is another run, which has to find the checkpoints
of the try before.

The idea: dstack gives every attempt of a run the same environment and volumes, so the directory is a variable
that the client sets. Its last part names whose checkpoints they are. The marker of an engine's run reads
``<engine>:<what owns the run>/<which try of it>``, so without the try it is the same for all tries. Any other
run has its own name. Source of the mounts: dstack 0.18.44 to 0.22.5, ``parse_mount_point``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration
from dstack_core.models.step_markers import split_step

CHECKPOINT = "DSTACK_CHECKPOINT"
# The number of a try, such as /1, /2of4#5f1c9a and /2of4#5f1c9a/keep. What follows # is the owner's.
_TRY = re.compile(r"(?P<owner>[a-z][a-z-]*:.+)/\d+(?:of\d+)?(?P<born>#[0-9a-f]+)?(?:/keep)?")
_NOT_SHOWN = re.compile(r"[^A-Za-z0-9_.]+")
# A file name has at most 255 bytes. Longer ones are hard to read; the hash distinguishes what is cut.
_LONGEST_SHOWN = 100


def check_checkpoint(configuration: Configuration, checkpoint: str) -> None:
    """Raise ``ConfigurationError`` unless a run can keep its checkpoints below that path."""
    if CHECKPOINT in (configuration.env or ()):
        raise ConfigurationError(
            f"survive.checkpoint: expected no {CHECKPOINT} in env with it, got both. Leave one of them out."
        )
    mounted = [path for item in configuration.volumes or () if (path := _kept_path(item))]
    if any(PurePosixPath(checkpoint).is_relative_to(path) for path in mounted):
        return
    place = "/".join(PurePosixPath(checkpoint).parts[:2]).removeprefix("/")
    where, way = "a mounted volume", f'mount one, such as volumes: ["my-volume:{place}"]'
    if mounted:
        where = f"one of the configuration's volumes ({', '.join(mounted)})"
        way = f"use one of these paths, or mount a volume at {place}"
    raise ConfigurationError(
        f"survive.checkpoint: expected a path in {where}, got {checkpoint!r}. Anything else is lost with the "
        f"machine: {way}."
    )


def with_checkpoint(configuration: Configuration, survive: Any, run_name: str, marker: str) -> Configuration:
    """Return the configuration whose environment names the directory of this run, and of its later tries.

    ``survive`` is the option, already checked; without a ``checkpoint`` nothing changes.
    """
    # Only a caller of it pays for the import.
    from dstack_core.models.survive import read_survive

    given = read_survive(survive)
    if given is None or given.checkpoint is None:
        return configuration
    own = configuration.env if isinstance(configuration.env, Mapping) else {}
    marker, step = split_step(marker)
    if step > 1:
        run_name = run_name.removesuffix(f"-s{step}")
    directory = f"{given.checkpoint}/{_owner(marker) or run_name}"
    return configuration.model_copy(update={"env": {**own, CHECKPOINT: directory}})


def _owner(marker: str) -> str | None:
    """Return the directory's name for all tries of an owner; None if the marker counts no tries."""
    found = _TRY.fullmatch(marker)
    if found is None:
        return None
    owner, born = found["owner"], found["born"] or ""
    shown = _NOT_SHOWN.sub("-", owner.partition(":")[2])[:_LONGEST_SHOWN].strip("-.")
    return f"{shown}-{sha256((owner + born).encode()).hexdigest()[:8]}".lstrip("-")


def _kept_path(item: Any) -> str | None:
    """Return where a volume is mounted; None for one that a machine may lack."""
    if isinstance(item, Mapping):
        path = None if item.get("optional") else item.get("path")
    else:
        path = str(item).rpartition(":")[2]
    return path if isinstance(path, str) and path.startswith("/") else None
