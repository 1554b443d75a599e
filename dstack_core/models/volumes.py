"""Network volumes: disks that outlive runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, field_validator

from dstack_core.errors import ConfigurationError
from dstack_core.models.base import Model
from dstack_core.models.options import read_duration
from dstack_core.models.resource_statuses import VOLUME, Stage, stage_of

# Where a new volume needs a size; servers may add other backends.
_SIZED = frozenset({"aws", "gcp", "kubernetes", "runpod"})
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:mb|gb|tb)?")


def _amount(size: str | float) -> float:
    """Return the number in a size; 0 for what is not one."""
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.replace(" ", "").lower())
        return float(found[1]) if found else 0.0
    return 0.0 if math.isinf(size) else float(size)


class VolumeConfiguration(Model):
    """The configuration of a network volume, as in a ``type: volume`` file.

    Any other key is kept and passed through to the server, which checks it.

    Attributes:
        type: ``"volume"``.
        name: The volume's name.
        backend: The backend it is created in, such as ``"aws"``.
        region: The backend's region.
        availability_zone: The zone within the region.
        size: Its size, such as ``"100GB"``; a bare number is in GB. Needed for a new volume.
        volume_id: The cloud's id of a volume that exists, which is registered instead of creating one.
        auto_cleanup_duration: How long after its last use the server deletes it: an int in seconds, a str
            such as ``"1d"``, or ``"off"``. Default: it is kept.
        tags: Tags of the cloud's resources (dict of str).

    Raises:
        ConfigurationError: A value is one that no server accepts.

    Example:
        ``VolumeConfiguration(name="data", backend="aws", region="eu-west-1", size="100GB")``

    Source: PROTOCOL 1.2; the reference of ``volume`` in dstack's documentation.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)
    _form = "a mapping as in a `type: volume` file"

    type: Literal["volume"] = "volume"
    name: str | None = None
    backend: str
    region: str | None = None
    availability_zone: str | None = None
    size: str | float | None = None
    volume_id: str | None = None
    auto_cleanup_duration: int | str | bool | None = None
    tags: dict[str, str] | None = None

    @field_validator("auto_cleanup_duration", mode="before")
    @classmethod
    def _check_duration(cls, value: Any) -> Any:
        return read_duration(value, below_zero=True)

    def check(self) -> None:
        """Raise ``ConfigurationError`` for a size that no disk has, and for a new volume without one.

        Servers accept a size of 0 or less, and clouds refuse it later.
        """
        if self.size is not None and not _amount(self.size) > 0:
            raise ConfigurationError(
                f'VolumeConfiguration.size: expected a size above 0, such as "100GB", got {self.size!r}.'
            )
        given = (self.size, self.volume_id, (self.model_extra or {}).get("claim_name"))
        if self.backend in _SIZED and given == (None, None, None):
            raise ConfigurationError(
                'VolumeConfiguration: expected size such as "100GB" for a new volume, or volume_id for one '
                "that exists, got neither."
            )


@dataclass(frozen=True, slots=True)
class Volume:
    """A network volume as the server has it.

    Attributes:
        id: The volume's id (a UUID).
        name: Its name.
        project: The project it belongs to.
        status: The server's word: ``"submitted"``, ``"provisioning"``, ``"active"`` or ``"failed"``.
        status_message: Why, in the server's words, or None.
        created_at: When it was created (aware).
        backend, region: Where it is, or None.
        size: Its size in bytes, or None.
        external: Whether it was registered and not created.
        attached_to: The names of the machines that it is attached to (tuple of str).
        cost: What it has cost so far in USD, or None.
        price_per_month: Its price in USD per month, or None.
        tags: Its tags.
        configuration: Its configuration as the server keeps it.

    Source: PROTOCOL 1.2.
    """

    id: str
    name: str
    project: str
    status: str
    created_at: datetime
    status_message: str | None = None
    backend: str | None = None
    region: str | None = None
    size: int | None = None
    external: bool = False
    attached_to: tuple[str, ...] = ()
    cost: float | None = None
    price_per_month: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_active(self) -> bool:
        """Return whether runs can mount it."""
        return stage_of(VOLUME, self.status) is Stage.USABLE

    @property
    def has_failed(self) -> bool:
        """Return whether it could not be created."""
        return stage_of(VOLUME, self.status) is Stage.ENDED
