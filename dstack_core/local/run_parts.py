"""The parts of a run whose jobs are alike: the run itself, or its groups of nodes or replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstack_core.local.quantities import ResourcesSpec
from dstack_core.local.spec_parts import PortMapping
from dstack_core.local.specs import (
    Configuration,
    DevEnvironmentConfiguration,
    ServiceConfiguration,
    TaskConfiguration,
)


@dataclass(frozen=True)
class Part:
    """Jobs of one kind: what they run, on which resources, and how many there are."""

    name: str
    resources: ResourcesSpec
    commands: list[str]
    image: str | None
    privileged: bool
    nodes: int = 1
    replicas: int = 1
    ports: list[PortMapping] = field(default_factory=list)
    spot_policy: str | None = None
    reservation: str | None = None


def parts(configuration: Configuration) -> list[Part]:
    """Return the parts of a run."""
    if isinstance(configuration, TaskConfiguration):
        return _of_task(configuration)
    if isinstance(configuration, ServiceConfiguration):
        return _of_service(configuration)
    commands, ports = [], []
    if isinstance(configuration, DevEnvironmentConfiguration):
        commands, ports = [*configuration.init, "tail -f /dev/null"], configuration.ports
    return [
        Part(
            "0",
            configuration.resources,
            commands,
            configuration.image,
            configuration.privileged,
            ports=ports,
        )
    ]


def _of_task(task: TaskConfiguration) -> list[Part]:
    if task.groups is None:
        return [
            Part(
                "0",
                task.resources,
                task.commands,
                task.image,
                task.privileged,
                nodes=task.nodes or 1,
                ports=task.ports,
            )
        ]
    return [
        Part(
            group.name or "",
            group.resources,
            group.commands,
            task.image,
            task.privileged,
            nodes=group.nodes,
            ports=group.ports,
        )
        for group in task.groups
    ]


def _of_service(service: ServiceConfiguration) -> list[Part]:
    if service.groups is None:
        replicas = 1 if service.replicas is None else service.replicas.min or 0
        return [
            Part(
                "0",
                service.resources,
                service.commands,
                service.image,
                service.privileged,
                replicas=replicas,
            )
        ]
    return [
        Part(
            group.name or "",
            group.resources,
            group.commands,
            service.image if group.image is None else group.image,
            service.privileged if group.privileged is None else group.privileged,
            replicas=group.replicas.min or 0,
            spot_policy=group.spot_policy,
            reservation=group.reservation,
        )
        for group in service.groups
    ]
