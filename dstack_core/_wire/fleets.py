"""The calls for fleets and how their replies are read (PROTOCOL 1.2).

A fleet is created by ``fleets/apply``, on servers before 0.19.6 by ``fleets/create``. Both refuse a name that
is taken, unless the request names the fleet as it is now. ``configuration_path`` is a free text that every
server stores and returns, so it carries the owner's marker, as it does for runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstack_core._wire.api import Api, none_when_missing
from dstack_core._wire.hardware import read_hardware
from dstack_core._wire.http_messages import Call, time_of
from dstack_core._wire.plans import parse_offer
from dstack_core._wire.spec import any_resources, keys_that_were_set
from dstack_core.models.fleets import Fleet, FleetConfiguration, FleetPlan, Instance

_MARKER = "configuration_path"


@dataclass(frozen=True, slots=True)
class StoredFleet:
    """A fleet, and the reply it was read from, which an update has to name."""

    fleet: Fleet
    data: Mapping[str, Any] = field(repr=False)

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the fleet's spec as the server keeps it."""
        spec: Mapping[str, Any] = self.data["spec"]
        return spec


@dataclass(frozen=True, slots=True)
class StoredFleetPlan:
    """A plan, and the specs that an update is decided by."""

    plan: FleetPlan
    current: StoredFleet | None
    effective: Mapping[str, Any] = field(repr=False)

    @property
    def changes(self) -> tuple[str, ...]:
        """Return the keys of the configuration that an update would change, and the marker's if it would."""
        if self.current is None:
            return ()
        old, new = self.current.spec, self.effective
        changed = [
            key
            for key in sorted({*old["configuration"], *new["configuration"]})
            if _shown(key, old["configuration"].get(key)) != _shown(key, new["configuration"].get(key))
        ]
        return (*changed, *((_MARKER,) if old.get(_MARKER) != new.get(_MARKER) else ()))


@dataclass(frozen=True, slots=True)
class FleetApi:
    """The calls for the fleets of a project."""

    api: Api

    def get(self, name: str) -> Call[StoredFleet | None]:
        """Ask for the fleet of that name; None when it is missing or deleted."""
        return none_when_missing(self.api.call(self.api.path("fleets/get"), {"name": name}, parse_fleet))

    def get_by_id(self, fleet_id: str) -> Call[StoredFleet | None]:
        """Ask for a fleet by its id, also one that is deleted."""
        return none_when_missing(self.api.call(self.api.path("fleets/get"), {"id": fleet_id}, parse_fleet))

    def list(self) -> Call[list[Fleet]]:
        """Ask for the project's fleets."""
        return self.api.call(
            self.api.path("fleets/list"), {}, lambda data: [parse_fleet(item).fleet for item in data]
        )

    def get_plan(self, spec: Mapping[str, Any]) -> Call[StoredFleetPlan]:
        """Ask what an apply would do; nothing is changed."""
        return self.api.call(self.api.path("fleets/get_plan"), {"spec": spec}, _parse_plan)

    def create(self, spec: Mapping[str, Any], *, by_apply: bool) -> Call[StoredFleet]:
        """Create a fleet; refused if its name is taken."""
        body: dict[str, Any] = {"plan": {"spec": spec}, "force": False} if by_apply else {"spec": spec}
        path = "fleets/apply" if by_apply else "fleets/create"
        return self.api.call(self.api.path(path), body, parse_fleet, idempotent=False)

    def update(self, spec: Mapping[str, Any], current: StoredFleet) -> Call[StoredFleet]:
        """Update a fleet in place; refused if it is no longer ``current``."""
        body = {"plan": {"spec": spec, "current_resource": current.data}, "force": False}
        return self.api.call(self.api.path("fleets/apply"), body, parse_fleet, idempotent=False)

    def delete(self, name: str) -> Call[None]:
        """Ask to delete a fleet with its machines; a missing one is fine."""
        return self.api.call(self.api.path("fleets/delete"), {"names": [name]}, lambda _: None)

    def delete_instances(self, name: str, numbers: Sequence[int]) -> Call[None]:
        """Ask to delete machines of a fleet; missing ones are fine."""
        body = {"name": name, "instance_nums": list(numbers)}
        return self.api.call(self.api.path("fleets/delete_instances"), body, lambda _: None)


def fleet_spec(configuration: FleetConfiguration, *, name: str, marker: str | None) -> dict[str, Any]:
    """Return the spec of a fleet as it is sent."""
    wire = keys_that_were_set(configuration)
    if configuration.resources is not None:
        wire["resources"] = any_resources(configuration.resources)
    spec: dict[str, Any] = {"configuration": {**wire, "name": name}, "profile": {"name": "default"}}
    return spec if marker is None else {**spec, _MARKER: marker}


def parse_fleet(data: Mapping[str, Any]) -> StoredFleet:
    """Read one fleet; every field but id, name, status and time is optional."""
    spec = data.get("spec") or {}
    fleet = Fleet(
        id=str(data["id"]),
        name=data["name"],
        project=data["project_name"],
        status=str(data["status"]),
        created_at=time_of(data["created_at"]),
        instances=tuple(_instance(item) for item in data.get("instances") or ()),
        status_message=data.get("status_message"),
        marker=spec.get(_MARKER),
        configuration=dict(spec.get("configuration") or {}),
    )
    return StoredFleet(fleet, data)


def _instance(data: Mapping[str, Any]) -> Instance:
    kind = data.get("instance_type") or {}
    hardware = read_hardware(kind.get("resources"))
    price = data.get("price")
    return Instance(
        id=str(data["id"]),
        number=int(data["instance_num"]),
        name=data["name"],
        status=str(data["status"]),
        backend=data.get("backend"),
        region=data.get("region"),
        instance_type=kind.get("name"),
        price_per_hour=None if price is None else float(price),
        hostname=data.get("hostname"),
        spot=bool((kind.get("resources") or {}).get("spot")),
        gpu=hardware.gpu,
        gpus=hardware.gpus,
        gpu_memory=hardware.gpu_memory,
        unreachable=bool(data.get("unreachable")),
        created_at=time_of(data["created"]) if data.get("created") else None,
        finished_at=time_of(data["finished_at"]) if data.get("finished_at") else None,
        termination_reason=data.get("termination_reason"),
    )


def _parse_plan(data: Mapping[str, Any]) -> StoredFleetPlan:
    current = None if data.get("current_resource") is None else parse_fleet(data["current_resource"])
    offers = tuple(parse_offer(item) for item in data.get("offers") or ())
    plan = FleetPlan(
        action=data.get("action"),
        current=None if current is None else current.fleet,
        offers=offers,
        total_offers=int(data.get("total_offers") or len(offers)),
        max_price_per_hour=data.get("max_offer_price"),
    )
    return StoredFleetPlan(plan, current, data.get("effective_spec") or data["spec"])


def _shown(key: str, value: Any) -> Any:
    """Return what a server shows of a value: keys of SSH hosts are sent, and never returned."""
    if key == "ssh_config" and isinstance(value, Mapping | list):
        return _without_keys(value)
    return value


def _without_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_keys(each) for key, each in value.items() if key not in ("ssh_key",)}
        return {key: each for key, each in kept.items() if each is not None}
    return [_without_keys(each) for each in value] if isinstance(value, list) else value
