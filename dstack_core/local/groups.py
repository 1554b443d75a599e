"""Groups of nodes and of replicas, checked as strictly as by a real server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dstack_core.local.profiles import SpotPolicy
from dstack_core.local.quantities import IntRange, ResourcesSpec, Strict
from dstack_core.local.service_parts import Router, Scaling, check_replicas, check_scaling
from dstack_core.local.spec_parts import PortMapping, Python, read_port, read_python

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
# A key of the service, and the keys that it excludes in its groups.
_EXCLUDES = {
    "image": ("image", "docker", "python", "nvcc"),
    "docker": ("docker", "image"),
    "python": ("python", "image", "docker"),
    "nvcc": ("nvcc", "image", "docker"),
    "privileged": ("privileged",),
    "spot_policy": ("spot_policy",),
    "reservation": ("reservation",),
}


class NodeGroup(Strict):
    """Some nodes of a task."""

    name: _Name | None = None
    nodes: Annotated[int, Field(ge=1)] = 1
    resources: ResourcesSpec = ResourcesSpec()
    commands: list[str] = Field(default_factory=list)
    ports: list[Annotated[PortMapping, BeforeValidator(read_port)]] = Field(default_factory=list)


class ReplicaGroup(Strict):
    """Some replicas of a service."""

    name: _Name | None = None
    replicas: Annotated[IntRange, AfterValidator(check_replicas)]
    scaling: Scaling | None = None
    resources: ResourcesSpec = ResourcesSpec()
    spot_policy: SpotPolicy | None = None
    reservation: str | None = None
    commands: list[str] = Field(default_factory=list)
    image: str | None = None
    python: Annotated[Python | None, BeforeValidator(read_python)] = None
    nvcc: bool | None = None
    docker: bool | None = None
    privileged: bool | None = None
    router: Router | None = None

    @model_validator(mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "count" not in value:
            return value
        count = value["count"]
        rest = {key: one for key, one in value.items() if key != "count"}
        return {"replicas": count, **rest}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_scaling(self.replicas, self.scaling)
        check_image_sources(self)
        if self.docker and self.privileged is False:
            raise ValueError("`privileged: false` is incompatible with `docker: true`")
        return self


def check_image_sources(one: Any) -> None:
    """Raise ValueError if the image is specified in two ways."""
    if one.python is not None and one.image:
        raise ValueError("`image` and `python` are mutually exclusive fields")
    if one.docker and (one.image or one.python or one.nvcc):
        raise ValueError("`docker` excludes `image`, `python` and `nvcc`")


def name_groups(groups: Sequence[NodeGroup | ReplicaGroup]) -> None:
    """Name each unnamed group by its number; raises ValueError without groups or if names repeat."""
    if not groups:
        raise ValueError("`groups` cannot be an empty list")
    for number, group in enumerate(groups):
        group.name = str(number) if group.name is None else group.name
    if len({group.name for group in groups}) < len(groups):
        raise ValueError("Each group must have a unique name")


def check_replica_groups(service: Any) -> None:
    """Raise ValueError if a service and its groups contradict each other."""
    groups: list[ReplicaGroup] = service.groups
    if service.scaling is not None or service.commands:
        raise ValueError("Top-level `scaling` and `commands` are not allowed when `groups` is set")
    for key, excluded in _EXCLUDES.items():
        value = getattr(service, key)
        given = (
            value is not None if key in ("image", "python", "spot_policy", "reservation") else value is True
        )
        if given and any(getattr(group, other) is not None for group in groups for other in excluded):
            raise ValueError(f"`{key}` of the service conflicts with a replica group")
    if any(not one.commands and one.image is None for one in groups) and service.image is None:
        raise ValueError("Either `commands` or `image` must be set in each group, or `image` for all")
    routers = [group for group in groups if group.router is not None]
    if len(routers) > 1 or any((one.replicas.min, one.replicas.max) != (1, 1) for one in routers):
        raise ValueError("At most one replica group may have a `router`, and it must have one replica")
