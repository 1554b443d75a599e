"""The fleets of the project: created, changed and deleted by requests; their instances come and go.

An instance of a cloud fleet is ``pending`` and then ``provisioning``, each for `Pace.instance` seconds, and
then ``idle``. It is ``busy`` while jobs run on it (`machines`). If it was idle for the fleet's
``idle_duration`` and the fleet has more than ``nodes.min``, it is ``terminating`` and then gone. The hosts of
an SSH fleet come the same way and stay.

A real server that finds no offer for an instance tries again and again. Here the instance stays listed as
``terminated`` with ``no_offers`` until the fleet is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from dstack_core import clock
from dstack_core.local.errors import bad_request
from dstack_core.local.fleet_rules import check_fleet, check_update, with_gpu
from dstack_core.local.fleet_specs import FleetSpec, SSHHost
from dstack_core.local.fleets import Fleet, Instance
from dstack_core.local.inventory import BACKEND, Inventory, Where, offer
from dstack_core.local.locations import Location
from dstack_core.local.quantities import ResourcesSpec
from dstack_core.local.random_names import unused_name
from dstack_core.local.runs import now

_CHANGED = "Failed to apply plan. Resource has been changed. Try again or use force apply."
# Seconds: how long an instance of a fleet, or one that was created for a run, is kept idle by default.
_FLEET_IDLE = 3 * 24 * 3600
_RUN_IDLE = 5 * 60


class FleetPool:
    """The fleets of one project; call every method in the server's event loop."""

    def __init__(self, project: str, inventory: Inventory, seconds: float) -> None:
        self._project = project
        self._inventory = inventory
        self._seconds = seconds
        self._tasks: set[asyncio.Task[None]] = set()
        # All fleets by id, oldest first, also deleted ones.
        self.fleets: dict[str, Fleet] = {}

    def named(self, name: str) -> Fleet | None:
        """Return the fleet with a name, or None."""
        return next((one for one in self.present if one.name == name), None)

    @property
    def present(self) -> list[Fleet]:
        """Return the fleets that are not deleted, oldest first."""
        return [one for one in self.fleets.values() if not one.deleted]

    def check_hosts(self, spec: FleetSpec, current: Fleet | None) -> None:
        """Raise ApiError 400 if a host belongs to another fleet."""
        if spec.configuration.ssh_config is None:
            return
        taken = {
            one.hostname
            for fleet in self.present
            if fleet is not current and fleet.is_ssh
            for one in fleet.present
        }
        if double := [name for name in spec.configuration.ssh_config.names() if name in taken]:
            raise bad_request(f"Instances [{', '.join(double)}] are already assigned to a fleet.")

    def apply(self, spec: FleetSpec, seen: tuple[str, FleetSpec] | None, force: bool) -> Fleet:
        """Create a fleet or update it in place; `seen` is the fleet that the caller believes to exist.

        Raises ApiError 400 if it cannot be updated, or differs from what the caller has seen.
        """
        spec = check_fleet(spec)
        current = self.named(spec.configuration.name or "")
        if current is None:
            self.check_hosts(spec, None)
            return self._create(spec)
        shown = current.spec.shown()
        if not force and (seen is None or (seen[0], with_gpu(seen[1]).shown()) != (current.id, shown)):
            raise bad_request(_CHANGED)
        check_update(current.spec, spec)
        self._update(current, spec)
        return current

    def _create(self, spec: FleetSpec) -> Fleet:
        configuration = spec.configuration
        configuration.name = configuration.name or unused_name({one.name for one in self.present})
        fleet = Fleet(self._project, configuration.name, spec)
        self.fleets[fleet.id] = fleet
        if configuration.ssh_config is not None:
            self._add_hosts(fleet, configuration.ssh_config.hosts)
        for _ in range(0 if configuration.nodes is None else configuration.nodes.target):
            self._start(self._bring_up(self.add(fleet)))
        return fleet

    def _update(self, fleet: Fleet, spec: FleetSpec) -> None:
        before, after = fleet.spec.configuration.ssh_config, spec.configuration.ssh_config
        if before is not None and after is not None:
            new = [host for name, host in after.names().items() if name not in before.names()]
            self.check_hosts(spec, fleet)
            gone = [one for one in fleet.active if one.hostname not in after.names()]
            self._check_unused(fleet, [one.num for one in gone])
            self.terminate(gone, "terminated_by_user")
            self._add_hosts(fleet, new)
        fleet.spec = spec
        if fleet.is_ssh:
            return
        for _ in range(fleet.least - len(fleet.active)):
            self._start(self._bring_up(self.add(fleet)))
        if fleet.most is not None:
            idle = [one for one in fleet.active if not one.jobs]
            surplus = max(0, len(fleet.active) - fleet.most)
            self.terminate(idle[len(idle) - surplus :] if surplus else [], "max_instances_limit")
        for one in fleet.active:
            if one.status == "idle":
                self._start(self._idle_out(one))

    def delete(self, names: Iterable[str], nums: Iterable[int] | None = None) -> None:
        """Delete fleets, or only the instances with some numbers; unknown ones are ignored.

        Raises ApiError 400 if a job runs on one of them.
        """
        chosen = [fleet for name in names if (fleet := self.named(name)) is not None]
        wanted = None if nums is None else list(nums)
        for fleet in chosen:
            self._check_unused(fleet, wanted)
        for fleet in chosen:
            gone = [one for one in fleet.present if wanted is None or one.num in wanted]
            self.terminate(gone, "terminated_by_user")
            if wanted is None:
                fleet.status = "terminating"
                self._start(self._bury(fleet))

    @staticmethod
    def _check_unused(fleet: Fleet, nums: list[int] | None) -> None:
        if not any(one.jobs and (nums is None or one.num in nums) for one in fleet.active):
            return
        if nums is None:
            raise bad_request(f"Failed to delete fleet {fleet.name}. Fleet is in use.")
        raise bad_request(
            f"Failed to delete fleet {fleet.name} instances {nums}. Fleet instances are in use."
        )

    def add(self, fleet: Fleet, run_idle: int | None = None, *, for_run: bool = False) -> Instance:
        """Add an instance to a cloud fleet; one for a run has the shorter of both idle durations."""
        given = [one for one in (fleet.spec.setting("idle_duration"), run_idle) if one is not None]
        limits = [one for one in given if one >= 0]
        default = None if given else (_RUN_IDLE if for_run else _FLEET_IDLE)
        idle = min(limits, default=default)
        blocks = fleet.spec.configuration.blocks
        instance = Instance(
            fleet, fleet.free_num(), blocks=None if blocks == "auto" else blocks, idle_seconds=idle
        )
        fleet.instances.append(instance)
        return instance

    def _add_hosts(self, fleet: Fleet, hosts: Iterable[SSHHost | str]) -> None:
        place = Location(BACKEND, "remote", 0.0)
        for host in hosts:
            own = host if isinstance(host, SSHHost) else SSHHost(hostname=host)
            blocks = fleet.spec.configuration.blocks if own.blocks is None else own.blocks
            found = offer(place, self._inventory.whole("ssh"))
            split = None if blocks == "auto" else blocks
            instance = Instance(fleet, fleet.free_num(), own.hostname, found, split)
            fleet.instances.append(instance)
            self._start(self._bring_up(instance))

    async def _bring_up(self, instance: Instance) -> None:
        await self._pause()
        if instance.status != "pending":
            return
        if instance.offer is None:
            spec = instance.fleet.spec
            resources = spec.configuration.resources or ResourcesSpec()
            is_spot = spec.spot() is True
            offers = self._inventory.offers(resources, where(spec), is_spot=is_spot)
            if not offers:
                instance.status, instance.finished_at = "terminated", now()
                instance.termination_reason = "no_offers"
                return
            instance.offer, instance.hostname = offers[0], "127.0.0.1"
        instance.status = "provisioning"
        await self._pause()
        if instance.status == "provisioning":
            self.idle(instance)

    def idle(self, instance: Instance) -> None:
        """Let an instance wait for a job until its idle duration has passed."""
        instance.status = "idle"
        self._start(self._idle_out(instance))

    async def _idle_out(self, instance: Instance) -> None:
        seconds = instance.idle_seconds
        if seconds is None:
            return
        since = instance.idle_since = object()
        await clock.asleep(seconds, caller=False)
        is_still_idle = instance.status == "idle" and instance.idle_since is since
        if is_still_idle and len(instance.fleet.active) > instance.fleet.least:
            message = f"Instance idle for {int(seconds)}s"
            self.terminate([instance], "idle_timeout", message)

    def terminate(self, instances: Iterable[Instance], reason: str, message: str | None = None) -> None:
        """Take instances away."""
        for one in instances:
            if one.status == "terminated":
                # It was listed because it found no offer; now it is gone.
                one.termination_reason = reason
            elif one.status != "terminating":
                one.status, one.termination_reason, one.termination_message = "terminating", reason, message
                self._start(self._take_down(one))

    async def _take_down(self, instance: Instance) -> None:
        await self._pause()
        instance.status, instance.finished_at = "terminated", now()

    async def _bury(self, fleet: Fleet) -> None:
        await self._pause()
        while fleet.active or any(one.status == "terminating" for one in fleet.instances):
            await self._pause()
        fleet.status, fleet.deleted = "terminated", True

    async def _pause(self) -> None:
        await clock.asleep(self._seconds, caller=False)

    def _start(self, life: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(life)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def where(spec: FleetSpec) -> Where:
    """Return where a fleet's instances may be."""
    return Where(spec.setting("backends"), spec.setting("regions"), spec.setting("max_price"))
