"""Volume configurations as the 0.22.5 server accepts and stores them, and the bodies of their endpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from dstack_core.local.checks import NAME_PATTERN
from dstack_core.local.errors import bad_request
from dstack_core.local.profiles import Tags
from dstack_core.local.quantities import Gigabytes, IdleSeconds, Strict
from dstack_core.local.resource_bodies import Page


class _Volume(Strict):
    type: Literal["volume"] = "volume"
    name: str | None = None
    auto_cleanup_duration: IdleSeconds = None
    tags: Tags = None

    @property
    def cloud_id(self) -> str | None:
        """Return the cloud's id of a volume that is registered; None for a new one."""
        return getattr(self, "volume_id", None) or getattr(self, "claim_name", None)

    @property
    def location(self) -> tuple[str, str]:
        """Return the backend and the region; the latter is empty where a backend has none."""
        return str(getattr(self, "backend", "")), str(getattr(self, "region", "")).lower()


class AWSVolume(_Volume):
    """A volume in AWS."""

    backend: Literal["aws"] = "aws"
    size: Gigabytes | None = None
    volume_id: str | None = None
    region: str
    availability_zone: str | None = None


class GCPVolume(_Volume):
    """A volume in GCP."""

    backend: Literal["gcp"] = "gcp"
    size: Gigabytes | None = None
    volume_id: str | None = None
    region: str
    availability_zone: str | None = None


class RunpodVolume(_Volume):
    """A volume in Runpod, which has no zones; servers accept one and leave it out."""

    backend: Literal["runpod"] = "runpod"
    size: Gigabytes | None = None
    volume_id: str | None = None
    region: str
    availability_zone: str | None = Field(default=None, exclude=True)


class KubernetesVolume(_Volume):
    """A persistent volume claim."""

    backend: Literal["kubernetes"] = "kubernetes"
    size: Gigabytes | None = None
    region: str = ""
    claim_name: str | None = None
    storage_class_name: str | None = None
    access_modes: list[str] = Field(default_factory=lambda: ["ReadWriteOnce"])
    read_only: bool = False


class DaytonaVolume(_Volume):
    """A volume in Daytona, which has no size."""

    backend: Literal["daytona"] = "daytona"
    volume_id: str | None = None


class LiumVolume(_Volume):
    """A volume in Lium, which has no size."""

    backend: Literal["lium"] = "lium"
    volume_id: str | None = None


VolumeConfiguration = Annotated[
    AWSVolume | GCPVolume | RunpodVolume | KubernetesVolume | DaytonaVolume | LiumVolume,
    Field(discriminator="backend"),
]


class ListVolumesRequest(Page):
    """The body of /api/volumes/list."""

    project_name: str | None = None


class CreateVolumeRequest(Strict):
    """The body of volumes/create."""

    configuration: VolumeConfiguration


def check_volume(configuration: VolumeConfiguration) -> None:
    """Raise ApiError 400 for what the schema cannot check."""
    is_sized = "size" in type(configuration).model_fields
    if is_sized and configuration.cloud_id is None and getattr(configuration, "size", None) is None:
        raise bad_request("Volume must specify either existing identifier or size")
    if configuration.name is not None and re.match(NAME_PATTERN, configuration.name) is None:
        raise bad_request(f"Resource name should match regex '{NAME_PATTERN}'")
    if configuration.cloud_id is not None and (configuration.auto_cleanup_duration or 0) > 0:
        raise bad_request(
            "External volumes do not support auto_cleanup_duration. "
            "Auto-cleanup only works for volumes created and managed by dstack."
        )
