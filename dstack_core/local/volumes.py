"""The volumes of the project: each is a directory of this machine, which `mounts` links into jobs.

A volume is ``submitted`` for `Pace.instance` seconds and then ``active``. If the server has `regions`, one of
a backend without a place there is ``failed`` instead, as on a server whose project lacks that backend. It is
deleted by a request, or when no job has used it for its ``auto_cleanup_duration``.

Source: the texts are those of 0.22.5.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from dstack_core import clock
from dstack_core.local.errors import ApiError, bad_request, not_exists
from dstack_core.local.inventory import Inventory
from dstack_core.local.logs import iso
from dstack_core.local.machines import Machine
from dstack_core.local.mounts import Mount
from dstack_core.local.random_names import unused_name
from dstack_core.local.runs import Job, now
from dstack_core.local.volume_specs import VolumeConfiguration, check_volume


class VolumeError(Exception):
    """A volume that a job cannot have; the message is the server's."""


@dataclass(eq=False)
class Volume:
    """A volume, and the directory of this machine that stands for it."""

    project: str
    user: str
    name: str
    configuration: VolumeConfiguration
    directory: Path
    id: str
    created_at: datetime = field(default_factory=now)
    status: str = "submitted"
    status_message: str | None = None
    changed_at: datetime = field(default_factory=now)
    is_leaving: bool = False
    deleted_at: datetime | None = None
    # The machines that it is attached to, by the submission that runs there.
    machines: dict[str, Machine] = field(default_factory=dict)
    # Another object each time that its last job ends.
    idle_since: object = None

    @property
    def deleted(self) -> bool:
        """Return whether it is gone."""
        return self.deleted_at is not None

    def wire(self) -> dict[str, Any]:
        """Return the volume as JSON data."""
        cloud_id = (self.configuration.cloud_id or f"vol-{self.id}") if self.status == "active" else None
        return {
            "id": self.id,
            "name": self.name,
            "user": self.user,
            "project_name": self.project,
            "configuration": self.configuration.model_dump(mode="json"),
            "external": self.configuration.cloud_id is not None,
            "created_at": iso(self.created_at),
            "last_processed_at": iso(self.changed_at),
            "status": self.status,
            "status_message": self.status_message,
            "deleted": self.deleted,
            "deleted_at": None if self.deleted_at is None else iso(self.deleted_at),
            "volume_id": cloud_id,
            "provisioning_data": None if cloud_id is None else self._provisioning_data(cloud_id),
            "cost": 0.0,
            "attachments": [_attachment(machine) for machine in self.machines.values()],
            "attachment_data": None,
        }

    def _provisioning_data(self, cloud_id: str) -> dict[str, Any]:
        size = getattr(self.configuration, "size", None)
        return {
            "backend": self.configuration.backend,
            "volume_id": cloud_id,
            "size_gb": None if size is None else int(size),
            "availability_zone": getattr(self.configuration, "availability_zone", None),
            "price": None,
            "attachable": True,
            "detachable": True,
            "backend_data": None,
        }


class VolumePool:
    """The volumes of one project; call every method in the server's event loop."""

    def __init__(
        self, project: str, user: str, inventory: Inventory, seconds: float, directory: Path
    ) -> None:
        self._project = project
        self._user = user
        self._inventory = inventory
        self._seconds = seconds
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()
        # All volumes, oldest first, also deleted ones.
        self.volumes: list[Volume] = []

    @property
    def present(self) -> list[Volume]:
        """Return the volumes that are not deleted, oldest first."""
        return [one for one in self.volumes if not one.deleted]

    def named(self, name: str) -> Volume | None:
        """Return the volume with a name, or None."""
        return next((one for one in self.present if one.name == name), None)

    def create(self, configuration: VolumeConfiguration) -> Volume:
        """Create a volume; raises ApiError 400 if its name is taken or its configuration is refused."""
        check_volume(configuration)
        if configuration.name is None:
            configuration.name = unused_name({one.name for one in self.present})
        elif self.named(configuration.name) is not None:
            raise bad_request("Resource exists", "resource_exists")
        key, name = str(uuid4()), configuration.name
        volume = Volume(self._project, self._user, name, configuration, self._directory / key, key)
        self.volumes.append(volume)
        self._start(self._bring_up(volume))
        return volume

    def delete(self, names: Iterable[str]) -> None:
        """Delete volumes; unknown ones are ignored.

        Raises ApiError 400, and deletes none, if a job uses one of them.
        """
        chosen = [volume for name in names if (volume := self.named(name)) is not None]
        for volume in chosen:
            if volume.machines:
                raise bad_request(f"Failed to delete volume {volume.name}. Volume is in use.")
        for volume in chosen:
            self._remove(volume)

    def check(self, job_spec: Mapping[str, Any]) -> None:
        """Raise ApiError 400 unless a job can mount its volumes now."""
        self._check(self.find(job_spec))

    def mounts(self, job_spec: Mapping[str, Any]) -> list[Mount]:
        """Return where a job gets its volumes; raises VolumeError unless it can mount them now."""
        try:
            found = self.find(job_spec)
            self._check(found)
        except ApiError as error:
            raise VolumeError(error.detail[0]["msg"]) from error
        if not all(found):
            raise VolumeError("Failed to find an eligible volume for the mount point")
        paths = [one["path"] for one in job_spec["volumes"] if "name" in one]
        # Of several volumes for one path, a real server takes one in the place of the machine.
        return [
            Mount(choice[0].name, choice[0].directory, path)
            for choice, path in zip(found, paths, strict=True)
        ]

    def find(self, job_spec: Mapping[str, Any]) -> list[list[Volume]]:
        """Return the volumes that each mount names.

        Raises ApiError 400 if one is missing or is being deleted.
        """
        found = []
        for names in (mount["name"] for mount in job_spec["volumes"] if "name" in mount):
            volumes = []
            for name in names:
                volume = self.named(name)
                if volume is None:
                    raise not_exists(f"Volume {names} not found")
                if volume.is_leaving:
                    raise bad_request(f"Volume {names} is marked for deletion and cannot be attached")
                volumes.append(volume)
            found.append(volumes)
        return found

    @staticmethod
    def _check(found: list[list[Volume]]) -> None:
        places = [{volume.configuration.location for volume in volumes} for volumes in found]
        for volumes, locations in zip(found, places, strict=True):
            if locations != places[0]:
                raise bad_request("Volumes from different locations specified for different mount points")
            for volume in volumes:
                if volume.status != "active":
                    raise bad_request(f"Cannot mount volumes that are not active: {volume.name}")
        names = [volume.name for volumes in found for volume in volumes]
        if len(names) != len(set(names)):
            raise bad_request("Cannot attach the same volume at different mount points")

    def attach(self, job: Job, machine: Machine) -> list[Mount]:
        """Attach the volumes of a job to its machine until `release`; raises VolumeError."""
        mounts = self.mounts(job.spec)
        for mount in mounts:
            volume = self.named(mount.volume)
            assert volume is not None  # noqa: S101 - found right before
            volume.machines[job.latest.id] = machine
        return mounts

    def release(self, submission_id: str) -> None:
        """Detach what a job has used."""
        for volume in self.present:
            if volume.machines.pop(submission_id, None) is not None and not volume.machines:
                self._start(self._idle_out(volume))

    async def _bring_up(self, volume: Volume) -> None:
        await clock.asleep(self._seconds, caller=False)
        if volume.is_leaving:
            return
        volume.changed_at = now()
        places = self._inventory.locations
        if places and volume.configuration.backend not in {place.backend for place in places}:
            volume.status, volume.status_message = "failed", "Backend not available"
            return
        size = getattr(volume.configuration, "size", None)
        if size is not None and not 0 < size < math.inf:
            # The server accepts any number, and its cloud refuses this one.
            volume.status, volume.status_message = "failed", f"Backend error: invalid volume size {size:g}GB"
            return
        volume.directory.mkdir(parents=True)
        volume.status = "active"
        await self._idle_out(volume)

    async def _idle_out(self, volume: Volume) -> None:
        seconds = volume.configuration.auto_cleanup_duration or 0
        if seconds <= 0:
            return
        since = volume.idle_since = object()
        await clock.asleep(seconds, caller=False)
        if volume.idle_since is since and not volume.machines:
            self._remove(volume)

    def _remove(self, volume: Volume) -> None:
        if not volume.is_leaving:
            volume.is_leaving = True
            self._start(self._take_down(volume))

    async def _take_down(self, volume: Volume) -> None:
        await clock.asleep(self._seconds, caller=False)
        await asyncio.to_thread(shutil.rmtree, volume.directory, ignore_errors=True)
        volume.changed_at = volume.deleted_at = now()

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


def _attachment(machine: Machine) -> dict[str, Any]:
    instance = machine.instance
    shown = {
        "name": machine.fleet["name"] if instance is None else instance.name,
        "fleet_name": machine.fleet["name"],
        "instance_num": 0 if instance is None else instance.num,
        "instance_id": "local" if instance is None else instance.name,
    }
    return {"instance": shown, "attachment_data": None}
