"""Where and how long a run runs: the fields that configurations and profiles share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, StrictStr, ValidationInfo, field_validator, model_validator

from dstack_core.models.base import Model
from dstack_core.models.options import check_duration, read_duration
from dstack_core.models.statuses import SpotPolicy


class ProfileFields(Model):
    """The fields that a profile can set for the configurations it is used with."""

    # A number where a string is expected (`name: 123`, a region called 1) is read as a string, as in dstack.
    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    fleets: Sequence[str | Mapping[str, Any]] | None = None
    # Strict, unlike other strings: dstack does not accept a number as the name of an instance.
    instances: Sequence[StrictStr | Mapping[str, Any]] | None = None
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
        return None if value is None else read_price(value)

    @field_validator("max_duration", "stop_duration", "idle_duration", mode="before")
    @classmethod
    def _check_duration(cls, value: Any, info: ValidationInfo) -> Any:
        return read_duration(value, below_zero=info.field_name == "idle_duration")

    @field_validator("tags", mode="before")
    @classmethod
    def _check_tags(cls, value: Any) -> Any:
        # dstack's client rejects a number here, and a bool would not come back as it was written.
        for name, text in value.items() if isinstance(value, Mapping) else ():
            if not isinstance(text, str):
                raise ValueError(f"expected a string for {name}, got {text!r}; put it in quotes")
        return value


def read_price(value: Any) -> float:
    """Return a price in USD per hour, also one written as text. Raises ``ValueError``."""
    try:
        price = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        price = math.nan
    if not 0 < price < math.inf:
        raise ValueError(f"expected USD per hour above 0, got {value!r}")
    return price


class Profile(ProfileFields):
    """A profile of a ``profiles.yml``: settings that configurations share.

    What a configuration sets itself wins. ``Configuration`` explains the fields that it shares.

    Attributes:
        name: The profile's name.
        default: Whether it is used if no profile is named.
        backends, backend_options, regions, availability_zones: Where machines come from.
        fleets, instances, instance_types, reservation: Which machines are used.
        spot_policy, creation_policy, max_price: Which machines, and for how much (USD per hour).
        max_duration, stop_duration, idle_duration, schedule: When, and for how long.
        retry, utilization_policy: What happens without capacity, and to a run that leaves its GPUs idle.
        startup_order, stop_criteria: The order of several nodes, and when their task ends.
        tags: Tags of the cloud's resources (dict of str).

    Raises:
        ConfigurationError: A value is wrong, or a key is not one of these.
    """

    # Unlike in a configuration, an unknown key is refused: no server would see and report `defualt: true`,
    # and the profile's limits would be lost.
    model_config = ConfigDict(extra="forbid")

    name: str = "default"
    default: bool = False


RETRY_EVENTS = ("no-capacity", "interruption", "error")


class RetryPolicy(Model):
    """Whether dstack starts a run again by itself, such as when there was no machine for it.

    Attributes:
        retry: Whether it does. Default: no; yes if ``on_events`` is given.
        limit: For how long: an int in seconds, or a str such as ``"12h"`` or ``"3d"``. Default: one hour.
        on_events: After what: ``"no-capacity"`` (no machine was available), ``"interruption"`` (the cloud
            took its spot machine away), ``"error"`` (anything else, such as a command that failed or a
            machine that was lost). Default: ``["no-capacity"]``.

    Source: the documented API, "RetryPolicy"; PROTOCOL 3.1, 3.2; ``retry`` of dstack's configurations.
    """

    retry: bool = False
    limit: int | str | None = None
    on_events: Sequence[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _retry_on_events(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("on_events") is not None and "retry" not in data:
            return {**data, "retry": True}
        return data

    @field_validator("on_events", mode="before")
    @classmethod
    def _check_events(cls, value: Any) -> Any:
        if value is None:
            return None
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not is_list or not value or any(event not in RETRY_EVENTS for event in value):
            known = ", ".join(f'"{event}"' for event in RETRY_EVENTS)
            raise ValueError(f"expected a list of {known}, got {value!r}")
        return list(value)

    @field_validator("limit")
    @classmethod
    def _check_limit(cls, value: int | str | None) -> int | str | None:
        check_duration(value)
        return value
