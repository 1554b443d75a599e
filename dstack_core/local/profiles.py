"""The scheduling keys that a configuration and a profile share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dstack_core.local.quantities import IdleSeconds, Seconds, SecondsOrOff, Strict

# 0.22.5 does not know the backend "local": a request that names it is refused here as well.
Backend = Literal[
    "amddevcloud", "aws", "azure", "cloudrift", "crusoe", "cudo", "datacrunch", "daytona", "digitalocean",
    "dstack", "gcp", "hotaisle", "jarvislabs", "kubernetes", "lambda", "lium", "remote", "nebius", "oci",
    "runpod", "seeweb", "tensordock", "vastai", "verda", "vultr", "slurm",
]  # fmt: skip
SpotPolicy = Literal["spot", "on-demand", "auto"]
RetryEvent = Literal["no-capacity", "interruption", "error"]
_LEAST_WINDOW = 300  # seconds, a limit of the server
_NOT_EMPTY = Field(min_length=1)


def read_reference(value: Any) -> Any:
    """Return the fleet or gateway that ``"name"`` or ``"project/name"`` refers to."""
    if not isinstance(value, str):
        return value
    parts = value.split("/")
    if len(parts) > 2 or "" in parts:
        raise ValueError("Invalid entity reference. Only `<name>` or `<project>/<name>` formats are allowed")
    return {"project": parts[0] if len(parts) == 2 else None, "name": parts[-1]}


class EntityReference(Strict):
    """A fleet or a gateway, of this project if `project` is None."""

    project: str | None = None
    name: str


def as_reference(value: Any) -> Any:
    """Return a reference for a string, anything else unchanged."""
    return EntityReference(**read_reference(value)) if isinstance(value, str) else value


Reference = Annotated[EntityReference, BeforeValidator(read_reference)]


class ProfileRetry(Strict):
    """The events to retry, and for how many seconds."""

    on_events: Annotated[list[RetryEvent], _NOT_EMPTY] | None = None
    duration: Seconds | None = None


class UtilizationPolicy(Strict):
    """The minimum GPU utilization in percent within a window of seconds."""

    min_gpu_utilization: Annotated[int, Field(ge=0, le=100)]
    time_window: Annotated[Seconds, Field(ge=_LEAST_WINDOW)]


class Schedule(Strict):
    """Cron expressions."""

    cron: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), _NOT_EMPTY]


class NamedInstance(Strict):
    """An instance known by its name."""

    name: Annotated[str, _NOT_EMPTY]


class HostInstance(Strict):
    """An instance known by its host."""

    hostname: Annotated[str, _NOT_EMPTY]


class FleetInstance(Strict):
    """An instance known by its number in a fleet."""

    fleet: Reference
    instance: Annotated[int, Field(ge=0)]


class VastaiOptions(Strict):
    """The options of the only backend that has any."""

    type: Literal["vastai"] = "vastai"
    offer_order: Literal["score", "price"] | None = None
    min_reliability: Annotated[float, Field(ge=0, le=1)] | None = None
    min_score: Annotated[int, Field(ge=0)] | None = None


def _check_options(value: list[VastaiOptions] | None) -> list[VastaiOptions] | None:
    if value is not None and len(value) > 1:
        raise ValueError("backend_options contains duplicate entry for backend 'vastai'")
    return value


def _check_tags(value: Any) -> Any:
    for key, text in value.items() if isinstance(value, dict) else ():
        if not isinstance(text, str):
            raise ValueError(f"Invalid tag value {text}")
        if re.fullmatch(r"[_\-a-zA-Z0-9]{1,60}\n?", key) is None:
            raise ValueError(f"Invalid tag key {key}")
        if re.fullmatch(r"[a-zA-Z0-9 .:/=_\-+@]{0,256}\n?", text) is None:
            raise ValueError(f"Invalid tag value {text}")
    return value


Tags = Annotated[dict[str, str] | None, BeforeValidator(_check_tags)]
BackendOptions = Annotated[list[VastaiOptions] | None, AfterValidator(_check_options)]


def _read_instance(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Instance = Annotated[NamedInstance | HostInstance | FleetInstance, BeforeValidator(_read_instance)]


class ProfileParams(Strict):
    """The scheduling keys."""

    backends: list[Backend] | None = None
    regions: list[str] | None = None
    availability_zones: list[str] | None = None
    instance_types: list[str] | None = None
    reservation: str | None = None
    spot_policy: SpotPolicy | None = None
    retry: ProfileRetry | bool | None = None
    max_duration: SecondsOrOff = None
    stop_duration: SecondsOrOff = None
    max_price: Annotated[float, Field(gt=0)] | None = None
    creation_policy: Literal["reuse", "reuse-or-create"] | None = None
    idle_duration: IdleSeconds = None
    utilization_policy: UtilizationPolicy | None = None
    startup_order: Literal["any", "master-first", "workers-first"] | None = None
    stop_criteria: Literal["all-done", "master-done"] | None = None
    schedule: Schedule | None = None
    fleets: list[Annotated[EntityReference | str, AfterValidator(as_reference)]] | None = None
    instances: Annotated[list[Instance], _NOT_EMPTY] | None = None
    tags: Tags = None
    backend_options: BackendOptions = None


class Profile(ProfileParams):
    """A named profile."""

    name: str = ""
    default: bool = False
