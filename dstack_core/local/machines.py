"""The machine of a job: of the fleet that the run names, or of the implicit fleet ``local``.

A run that names no fleet runs in the implicit fleet, whose machine has room for all runs; with `needs_fleet`
there is no such fleet, as on every real server since 0.20. In a fleet that was created, a job takes an idle
instance that fits, the cheapest first. Without one an instance is created, as far as ``nodes.max`` allows.
A fleet is considered if it can hold all jobs of the run. Source: the texts are those of 0.22.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from dstack_core.local.combined import CannotCombineError, combine_resources, combine_spot
from dstack_core.local.fleet_pool import FleetPool, where
from dstack_core.local.fleets import Fleet, Instance
from dstack_core.local.inventory import Inventory, Where, no_offers, suits
from dstack_core.local.job_specs import wanted_resources
from dstack_core.local.profiles import as_reference
from dstack_core.local.runs import Job, Run
from dstack_core.local.specs import RunSpec

IMPLICIT = "local"
_ADDRESS = "127.0.0.1"
_NO_FLEET = (
    "No matching fleet found. Possible reasons: https://dstack.ai/docs/guides/troubleshooting/#no-fleets"
)
_NOT_THESE = "Failed to use specified fleets"
_FULL = "Fleet is at capacity"
_NOTHING_TO_REUSE = "Could not reuse any instance for this job"


class NoMachineError(Exception):
    """A job without a machine; the message is the server's."""


@dataclass(eq=False)
class Machine:
    """What a job runs on: an offer as JSON data, and the fleet and instance that it belongs to."""

    fleet: dict[str, Any]
    offer: dict[str, Any]
    instance: Instance | None = None
    is_new: bool = False

    @property
    def is_spot(self) -> bool:
        """Return whether it is a spot machine."""
        return bool(self.offer["instance"]["resources"]["spot"])

    @property
    def gpus(self) -> int:
        """Return how many GPUs it has."""
        return len(self.offer["instance"]["resources"]["gpus"])

    def provisioning_data(self, ssh_port: int) -> dict[str, Any]:
        """Return the machine as a job's provisioning data."""
        return {
            "backend": self.offer["backend"],
            "base_backend": None,
            "instance_type": self.offer["instance"],
            "instance_id": "local" if self.instance is None else self.instance.name,
            "hostname": _ADDRESS,
            "internal_ip": _ADDRESS,
            "public_ip_enabled": True,
            "instance_network": None,
            "region": self.offer["region"],
            "availability_zone": None,
            "reservation": None,
            "price": self.offer["price"],
            "username": "root",
            "ssh_port": ssh_port,
            "dockerized": True,
            "ssh_proxy": None,
            "backend_data": None,
            "gpu_driver": None,
        }


class Machines:
    """The machines of one project; call every method in the server's event loop."""

    def __init__(self, project: str, inventory: Inventory, pool: FleetPool, needs_fleet: bool) -> None:
        self._project = project
        self._inventory = inventory
        self._pool = pool
        self._implicit = None if needs_fleet else {"id": str(uuid4()), "name": IMPLICIT}

    def _candidates(self, spec: RunSpec) -> tuple[list[Fleet], bool]:
        """Return the fleets that a run may use, and whether the implicit one is among them."""
        named = spec.setting("fleets")
        if named is None:
            return ([], True) if self._implicit is not None else (self._active(), False)
        references = [as_reference(one) for one in named]
        own = {one.name for one in references if one.project in (None, self._project)}
        found = [fleet for fleet in self._active() if fleet.name in own]
        # Files that people use in production name fleets that only a real server has; with ``needs_fleet``
        # they must exist here, too.
        return found, self._implicit is not None and (IMPLICIT in own or not found)

    def _active(self) -> list[Fleet]:
        return [fleet for fleet in self._pool.present if fleet.status == "active"]

    def find(self, run: Run, job: Job) -> Machine:
        """Reserve a machine for a job and record the run's fleet; raises NoMachineError without one."""
        fleets, may_be_implicit = self._candidates(run.spec)
        if run.fleet is not None:
            fleets = [fleet for fleet in fleets if fleet.id == run.fleet["id"]]
            may_be_implicit = may_be_implicit and self._implicit == run.fleet
        else:
            needed = sum(one.is_wanted for one in run.jobs)
            fleets = [fleet for fleet in fleets if _has_room(fleet, needed, job.spec)]
        if not fleets and not may_be_implicit:
            if run.spec.setting("fleets") is not None:
                raise NoMachineError(_NOT_THESE)
            raise NoMachineError(_NO_FLEET)
        machine = self._choose(fleets, run.spec, job)
        if machine is None and may_be_implicit:
            assert self._implicit is not None  # noqa: S101 - see _candidates
            machine = self._of_implicit(self._implicit, run.spec, job.spec)
        if machine is None:
            raise NoMachineError(_NOT_THESE)
        run.fleet = machine.fleet
        return machine

    def _of_implicit(self, fleet: dict[str, Any], spec: RunSpec, job_spec: dict[str, Any]) -> Machine:
        offers = self._inventory.offers(wanted_resources(job_spec), _where(spec))
        if not offers:
            raise NoMachineError(no_offers(IMPLICIT))
        return Machine(fleet, offers[0])

    def _choose(self, fleets: list[Fleet], spec: RunSpec, job: Job) -> Machine | None:
        """Reserve an instance of one of the fleets; raises NoMachineError if none has or gets one."""
        if not fleets:
            return None
        idle = [one for fleet in fleets for one in _reusable(fleet, spec, job.spec)]
        if idle:
            instance = min(idle, key=_price)
            return self._take(instance, job)
        if spec.setting("creation_policy") == "reuse":
            raise NoMachineError(_NOTHING_TO_REUSE)
        fleet, offers = self._cheapest(fleets, spec, job.spec)
        if fleet.is_ssh or (fleet.most is not None and len(fleet.active) >= fleet.most):
            raise NoMachineError(_FULL)
        if not offers:
            raise NoMachineError(no_offers(fleet.name))
        instance = self._pool.add(fleet, spec.setting("idle_duration"), for_run=True)
        instance.offer, instance.hostname, instance.status = offers[0], _ADDRESS, "provisioning"
        return self._take(instance, job, is_new=True)

    def _cheapest(
        self, fleets: list[Fleet], spec: RunSpec, job_spec: dict[str, Any]
    ) -> tuple[Fleet, list[dict[str, Any]]]:
        """Return the fleet with the cheapest offer for a new instance, and its offers."""
        offered = [(fleet, self.new_offers(fleet, spec, job_spec)) for fleet in fleets]
        return min(offered, key=lambda pair: pair[1][0]["price"] if pair[1] else float("inf"))

    def _take(self, instance: Instance, job: Job, *, is_new: bool = False) -> Machine:
        instance.jobs.add(job.latest.id)
        assert instance.offer is not None  # noqa: S101 - only instances with one are taken
        offer = dict(instance.offer)
        if instance.total_blocks > 1:
            # A part of the machine: what the job requests.
            offer["instance"] = self._inventory.instance(wanted_resources(job.spec))
        if not is_new:
            instance.status = "busy"
        return Machine(instance.fleet.reference(), offer, instance, is_new)

    def started(self, machine: Machine) -> None:
        """Record that the instance of a job is up."""
        if machine.instance is not None and machine.instance.status == "provisioning":
            machine.instance.status = "busy"

    def release(self, machine: Machine, submission_id: str, *, is_lost: bool = False) -> None:
        """Give a machine back when its job has ended, or when the machine itself is lost."""
        instance = machine.instance
        if instance is None:
            return
        instance.jobs.discard(submission_id)
        if is_lost:
            self._pool.terminate([instance], "unreachable")
        elif not instance.jobs and instance.is_active:
            self._pool.idle(instance)

    def new_offers(self, fleet: Fleet, spec: RunSpec, job_spec: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the offers for a new instance of a fleet that suits a job."""
        if fleet.is_ssh:
            return []
        try:
            resources = combine_resources(fleet.spec.configuration.resources, wanted_resources(job_spec))
            spot = combine_spot(fleet.spec.spot(), job_spec["requirements"]["spot"])
        except CannotCombineError:
            return []
        return self._inventory.offers(resources, where(fleet.spec), _where(spec), is_spot=spot is True)

    def plan(self, spec: RunSpec, job_spec: dict[str, Any], nodes: int, *, for_offers: bool) -> list[Any]:
        """Return the offers for a job of a run that is not submitted yet."""
        fleets, is_implicit = self._candidates(spec)
        anywhere = for_offers and spec.setting("fleets") is None
        if is_implicit or anywhere:
            return self._inventory.offers(wanted_resources(job_spec), _where(spec))
        fitting = [fleet for fleet in fleets if _has_room(fleet, nodes, job_spec)]
        found = [one for fleet in fitting for one in _reusable(fleet, spec, job_spec)]
        if not fitting:
            return []
        if found:
            fitting = [min(found, key=_price).fleet]
        chosen, offers = self._cheapest(fitting, spec, job_spec)
        idle = [{**(one.offer or {}), "availability": "idle"} for one in found if one.fleet is chosen]
        return [*idle, *offers]


def _where(spec: RunSpec) -> Where:
    return Where(spec.setting("backends"), spec.setting("regions"), spec.setting("max_price"))


def _price(instance: Instance) -> float:
    return float((instance.offer or {}).get("price", 0.0))


def _has_room(fleet: Fleet, nodes: int, job_spec: dict[str, Any]) -> bool:
    """Return whether a fleet may hold that many jobs; jobs of several nodes need a cluster."""
    configuration = fleet.spec.configuration
    if job_spec["requirements"]["multinode"] and configuration.placement != "cluster":
        return False
    if fleet.is_ssh:
        return sum(one.total_blocks - len(one.jobs) for one in fleet.active) >= nodes
    if fleet.most is None or configuration.blocks != 1:
        return True
    return fleet.most - sum(bool(one.jobs) for one in fleet.active) >= nodes


def _reusable(fleet: Fleet, spec: RunSpec, job_spec: dict[str, Any]) -> list[Instance]:
    resources, wanted = wanted_resources(job_spec), _where(spec)
    spot = job_spec["requirements"]["spot"]
    found = []
    for one in fleet.active:
        if not one.has_room or one.offer is None or not suits(one.offer["instance"], resources):
            continue
        if wanted.max_price is not None and wanted.max_price < one.offer["price"]:
            continue
        if spot is None or spot == one.offer["instance"]["resources"]["spot"]:
            found.append(one)
    return found
