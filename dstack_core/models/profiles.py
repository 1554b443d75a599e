"""Where and how long a run runs: the fields that a configuration and a profile share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, ValidationInfo, field_validator

from dstack_core.models.base import Model
from dstack_core.models.durations import check_duration
from dstack_core.models.statuses import SpotPolicy


class ProfileFields(Model):
    """The fields that a profile can set for the configurations it is used with."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    fleets: Sequence[str | Mapping[str, Any]] | None = None
    instances: Sequence[str | Mapping[str, Any]] | None = None
    backends: list[str] | None = None
    backend_options: Sequence[Mapping[str, Any]] | None = None
    regions: list[str] | None = None
    availability_zones: list[str] | None = None
    instance_types: list[str] | None = None
    reservation: str | None = None
    spot_policy: SpotPolicy | str | None = None
    creation_policy: str | None = None
    max_price: float | None = None
    max_duration: int | str | bool | None = None
    stop_duration: int | str | bool | None = None
    idle_duration: int | str | bool | None = None
    retry: bool | Mapping[str, Any] | None = None
    utilization_policy: Mapping[str, Any] | None = None
    startup_order: str | None = None
    stop_criteria: str | None = None
    schedule: Mapping[str, Any] | None = None
    tags: dict[str, str] | None = None

    @field_validator("max_price", mode="before")
    @classmethod
    def _check_price(cls, value: Any) -> Any:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
        ):
            raise ValueError(f"{value!r} is no price; write USD per hour above 0")
        return value

    @field_validator("max_duration", "stop_duration", "idle_duration")
    @classmethod
    def _check_duration(cls, value: int | str | bool | None, info: ValidationInfo) -> int | str | bool | None:
        # The older way to write that idle machines stay.
        if info.field_name == "idle_duration" and value == -1:
            return value
        return check_duration(value, off=True)


class Profile(ProfileFields):
    """A profile of a ``profiles.yml``: settings that configurations share.

    ``name`` (str), ``default`` (bool: used when no profile is named), and of the fields of ``Configuration``
    those on where, when and how long: ``fleets``, ``instances``, ``backends``, ``backend_options``,
    ``regions``, ``availability_zones``, ``instance_types``, ``reservation``, ``spot_policy``,
    ``creation_policy``, ``max_price``, ``max_duration``, ``stop_duration``, ``idle_duration``, ``retry``,
    ``utilization_policy``, ``startup_order``, ``stop_criteria``, ``schedule``, ``tags``. What a configuration
    sets itself wins. Raises ``ConfigurationError``.
    """

    name: str = "default"
    default: bool = False
