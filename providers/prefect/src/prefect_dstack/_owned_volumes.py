"""The network volume of one flow run: its name, and the tag that stands for its owner.

A server keeps no marker on a volume, so a hash of it is in the volume's tags, from which the cloud's labels
are made; those allow few characters. Another execution of the flow run computes the same name and tag and
finds its volume. Nothing but ``delete_volume`` deletes a volume, because it holds data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect_dstack._checks import check_seconds, check_switches
from prefect_dstack._names import Owner
from prefect_dstack._resource_names import identify_resource
from prefect_dstack._waits import Waits, run_logger

if TYPE_CHECKING:
    from dstack_core import Volume, VolumeConfiguration, VolumeLike

# Clouds need seconds for a volume; a longer wait mostly means that something is wrong.
WAIT_SECONDS = 600.0
DELETE_SECONDS = 600.0
_TAG = "dstack-prefect-owner"
_KEPT_MARKER = "prefect:volume/"


@dataclass(slots=True)
class VolumeJob:
    """One volume that is created here: checked, named and tagged, and created by nothing yet."""

    configuration: VolumeConfiguration
    name: str
    marker: str
    waits: Waits


def prepare_volume(
    configuration: VolumeLike,
    owner: Owner,
    *,
    name: str | None,
    keep: bool,
    timeout: float,
    retry_budget: float,
) -> VolumeJob:
    """Return the volume to create. Raises ``ConfigurationError``; no request has been made."""
    from dstack_core import ConfigurationError, load_volume

    check_switches(keep=keep)
    check_seconds(timeout=timeout, retry_budget=retry_budget)
    loaded = load_volume(configuration)
    if name is not None and not isinstance(name, str):
        raise ConfigurationError(f"name: expected the name of a volume, got {type(name).__name__}.")
    if keep:
        fixed = name or loaded.name
        if not fixed:
            raise ConfigurationError(
                "name: expected one for a volume with keep=True, by which other flow runs find it, got none."
            )
        volume_name, marker = fixed, f"{_KEPT_MARKER}{fixed}"
    else:
        ref = identify_resource(
            owner, "volume", loaded.model_dump(mode="json"), name=name, prefix=loaded.name
        )
        volume_name, marker = ref.name, ref.marker
    tagged = loaded.model_copy(update={"tags": {**(loaded.tags or {}), **_tags(marker)}})
    return VolumeJob(tagged, volume_name, marker, Waits(owner))


def volume_info(volume: Volume, job: VolumeJob) -> dict[str, Any]:
    """Return a volume as JSON-plain values, and log it."""
    run_logger().info("Volume %s is %s in %s.", volume.name, volume.status, _place(volume))
    return {
        "name": volume.name,
        "volume_id": volume.id,
        "status": volume.status,
        "marker": job.marker,
        "backend": volume.backend,
        "region": volume.region,
        "size": volume.size,
    }


def _place(volume: Volume) -> str:
    return " ".join(filter(None, (volume.backend, volume.region))) or "its project"


def check_owner(volume: Volume | None, marker: str) -> None:
    """Raise ``ResourceNameTakenError`` for a volume of another owner."""
    from dstack_core import ResourceNameTakenError

    if volume is not None and volume.tags.get(_TAG) != _tags(marker)[_TAG]:
        raise ResourceNameTakenError(
            f"volume: expected the one that create_volume returned, got a volume of another owner, "
            f"{volume.name!r}. It was left alone. Delete it by hand if it is not needed."
        )


def _tags(marker: str) -> dict[str, str]:
    from dstack_core.integration import short_hash

    return {_TAG: short_hash(marker)}
