"""Fleets and their instances: their fields and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

from dstack_core.local.fleet_specs import FleetSpec
from dstack_core.local.logs import iso
from dstack_core.local.runs import now

_FINISHED = ("terminating", "terminated")


@dataclass(eq=False)
class Instance:
    """A machine of a fleet; `offer` is None until one was found for it."""

    fleet: Fleet
    num: int
    hostname: str | None = None
    offer: dict[str, Any] | None = None
    # None: as many as it has GPUs, at least one.
    blocks: int | None = 1
    # Seconds that it may be idle; None: without limit.
    idle_seconds: float | None = None
    id: str = field(default_factory=lambda: str(uuid4()))
    created_at: datetime = field(default_factory=now)
    finished_at: datetime | None = None
    status: str = "pending"
    termination_reason: str | None = None
    termination_message: str | None = None
    # The submissions that run on it.
    jobs: set[str] = field(default_factory=set)
    # Another object each time that it becomes idle.
    idle_since: object = None

    @property
    def name(self) -> str:
        """Return its name: the fleet's and its number."""
        return f"{self.fleet.name}-{self.num}"

    @property
    def is_active(self) -> bool:
        """Return whether it is there or on its way."""
        return self.status not in _FINISHED

    @property
    def total_blocks(self) -> int:
        """Return into how many parts it is split."""
        if self.blocks is not None:
            return self.blocks
        gpus = 0 if self.offer is None else len(self.offer["instance"]["resources"]["gpus"])
        return max(1, gpus)

    @property
    def has_room(self) -> bool:
        """Return whether another job can start on it."""
        return self.status in ("idle", "busy") and len(self.jobs) < self.total_blocks

    def wire(self) -> dict[str, Any]:
        """Return the instance as JSON data."""
        offer = self.offer
        return {
            "id": self.id,
            "project_name": self.fleet.project,
            "backend": None if offer is None else offer["backend"],
            "instance_type": None if offer is None else offer["instance"],
            "name": self.name,
            "fleet_id": self.fleet.id,
            "fleet_name": self.fleet.name,
            "instance_num": self.num,
            "job_name": None,
            "hostname": self.hostname,
            "status": self.status,
            "unreachable": False,
            "health_status": "healthy",
            "termination_reason": self.termination_reason,
            "termination_reason_message": self.termination_message,
            "created": iso(self.created_at),
            "finished_at": None if self.finished_at is None else iso(self.finished_at),
            "region": None if offer is None else offer["region"],
            "availability_zone": None,
            "price": None if offer is None else offer["price"],
            "total_blocks": self.total_blocks,
            "busy_blocks": len(self.jobs),
            "gpu_driver": None,
        }


@dataclass(eq=False)
class Fleet:
    """A fleet; `spec` holds the keys of its hosts, which are never shown."""

    project: str
    name: str
    spec: FleetSpec = field(repr=False)
    id: str = field(default_factory=lambda: str(uuid4()))
    created_at: datetime = field(default_factory=now)
    status: str = "active"
    deleted: bool = False
    # All that it has ever had.
    instances: list[Instance] = field(default_factory=list, repr=False)

    @property
    def present(self) -> list[Instance]:
        """Return the instances that are not gone."""
        return [
            one
            for one in self.instances
            if one.status != "terminated" or one.termination_reason == "no_offers"
        ]

    @property
    def active(self) -> list[Instance]:
        """Return the instances that are there or on their way."""
        return [one for one in self.instances if one.is_active]

    @property
    def is_ssh(self) -> bool:
        """Return whether it consists of given hosts."""
        return self.spec.configuration.ssh_config is not None

    @property
    def most(self) -> int | None:
        """Return how many instances it may have; None: no limit, or given hosts."""
        nodes = self.spec.configuration.nodes
        return None if nodes is None else nodes.max

    @property
    def least(self) -> int:
        """Return how many instances are kept even if they are idle."""
        nodes = self.spec.configuration.nodes
        return 0 if nodes is None else nodes.min

    def free_num(self) -> int:
        """Return the lowest number that no present instance has."""
        taken = {one.num for one in self.present}
        return next(num for num in range(len(taken) + 1) if num not in taken)

    def reference(self) -> dict[str, Any]:
        """Return the fleet as a run names it."""
        return {"id": self.id, "name": self.name}

    def wire(self) -> dict[str, Any]:
        """Return the fleet as JSON data."""
        return {
            "id": self.id,
            "name": self.name,
            "project_name": self.project,
            "spec": self.spec.shown(),
            "created_at": iso(self.created_at),
            "status": self.status,
            "status_message": None,
            "instances": [one.wire() for one in sorted(self.present, key=lambda one: one.num)],
        }
