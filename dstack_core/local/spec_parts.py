"""The smaller parts of a run specification: ports, references, and the scheduling keys of profiles."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BeforeValidator, Field

from dstack_core.local.errors import ServerBugError
from dstack_core.local.quantities import IdleSeconds, Seconds, SecondsOrOff, Strict

# "local" is not among the backends 0.22.5 knows: a request naming it is refused here as it is there.
Backend = Literal[
    "amddevcloud", "aws", "azure", "cloudrift", "crusoe", "cudo", "datacrunch", "daytona", "digitalocean",
    "dstack", "gcp", "hotaisle", "jarvislabs", "kubernetes", "lambda", "lium", "remote", "nebius", "oci",
    "runpod", "seeweb", "tensordock", "vastai", "verda", "vultr", "slurm",
]  # fmt: skip
SpotPolicy = Literal["spot", "on-demand", "auto"]
RetryEvent = Literal["no-capacity", "interruption", "error"]
Python = Literal["3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]
Port = Annotated[int, Field(gt=0, le=65535)]


def read_env(value: Any) -> Any:
    """Return environment variables as a dict; raises ServerBugError without a ``=`` (PROTOCOL 1.1)."""
    if not isinstance(value, list):
        return value
    pairs: dict[str, str] = {}
    for item in value:
        if not isinstance(item, str) or not re.match(r"[a-zA-Z_][a-zA-Z0-9_]*(=|$)", item):
            raise ValueError("Environment variables must look like NAME=value")
        if "=" not in item:
            raise ServerBugError
        name, text = item.split("=", 1)
        pairs[name] = text
    return pairs


def read_port(value: Any) -> Any:
    """Return the mapping of ``8080``, ``"8080:80"`` or ``"*:80"`` (PROTOCOL 3.2)."""
    if isinstance(value, str):
        match = re.fullmatch(r"(?:(\d+|\*):)?(\d+)", value)
        if match is None:
            raise ValueError(f"Cannot parse the port mapping {value}")
        local = match[1] or match[2]
        return {"local_port": None if local == "*" else int(local), "container_port": int(match[2])}
    return {"local_port": value, "container_port": value} if isinstance(value, int) else value


def read_service_port(value: Any) -> Any:
    """Return the mapping of a service's port, which a bare number maps to port 80 (PROTOCOL 3.2)."""
    if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
        return {"local_port": 80, "container_port": value}
    return read_port(value)


def _read_reference(value: Any) -> Any:
    if isinstance(value, str):
        project, _, name = value.rpartition("/")
        return {"project": project or None, "name": name}
    return value


def read_file_mapping(value: Any) -> Any:
    """Return the mapping of ``"local:path"`` or ``"path"``."""
    if isinstance(value, str):
        local, _, path = value.partition(":")
        return {"local_path": local, "path": path or local}
    return value


class PortMapping(Strict):
    """Map a port of the caller's machine (None: any free one) to a port of the job."""

    local_port: Port | None = None
    container_port: Port


class RegistryAuth(Strict):
    """Hold the credentials of an image registry."""

    username: str
    password: str


class EntityReference(Strict):
    """Name a fleet or a gateway, of this project if `project` is None."""

    project: str | None = None
    name: str


class FilePathMapping(Strict):
    """Map a path of the caller's machine to one of the job."""

    local_path: str
    path: str


class FileArchiveMapping(Strict):
    """Place an uploaded archive at a path of the job (PROTOCOL 1.3)."""

    id: UUID
    path: str


class ProfileRetry(Strict):
    """Say which events are retried and for how many seconds."""

    on_events: list[RetryEvent] | None = None
    duration: Seconds | None = None


class UtilizationPolicy(Strict):
    """Hold the least GPU utilisation in percent within a window of seconds."""

    min_gpu_utilization: Annotated[int, Field(ge=0, le=100)]
    time_window: Seconds


class Schedule(Strict):
    """Hold cron expressions."""

    cron: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class ProfileParams(Strict):
    """Hold the scheduling keys that a configuration and a profile share."""

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
    fleets: list[Annotated[EntityReference, BeforeValidator(_read_reference)]] | None = None
    instances: list[dict[str, Any] | str] | None = None
    tags: dict[str, str] | None = None
    backend_options: list[dict[str, Any]] | None = None


class Profile(ProfileParams):
    """Hold a named profile."""

    name: str = ""
    default: bool = False
