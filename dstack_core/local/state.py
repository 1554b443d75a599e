"""The state of one server: its user, its project, runs, repos, uploads and logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from dstack_core.local.bodies import SaveRepoCredsRequest
from dstack_core.local.engine import Engine
from dstack_core.local.errors import unknown_project
from dstack_core.local.events import EventLog
from dstack_core.local.fleet_pool import FleetPool
from dstack_core.local.inventory import Inventory
from dstack_core.local.jobs import JobCarrier, Pace
from dstack_core.local.keys import UserKeys
from dstack_core.local.logs import LogStore, iso
from dstack_core.local.machines import Machines
from dstack_core.local.metrics import GpuUsage, MetricsStore
from dstack_core.local.project_secrets import ProjectSecrets
from dstack_core.local.runs import Run, now
from dstack_core.local.scenarios import Scenarios
from dstack_core.local.ssh_host import SshHost
from dstack_core.local.transitions import Transitions
from dstack_core.local.volumes import VolumePool
from dstack_core.local.workspace import Sources

SERVER_VERSION = "0.22.5"
USERNAME = "admin"


@dataclass(frozen=True)
class Settings:
    """The settings that a server was created with."""

    project: str
    token: str
    inventory: Inventory
    pace: Pace
    metrics_seconds: float = 10.0
    gpu_usage: GpuUsage | None = None
    needs_fleet: bool = False

    def __repr__(self) -> str:
        return f"Settings(project={self.project!r})"


class State:
    """The state of one server; call every method in the server's event loop."""

    def __init__(self, settings: Settings, directory: Path, scenarios: Scenarios) -> None:
        self.settings = settings
        self.scenarios = scenarios
        self.uploads = directory / "uploads"
        self.uploads.mkdir()
        self.project_id = str(uuid4())
        self.user_id = str(uuid4())
        self.created_at = iso(now())
        self.keys = UserKeys()
        self.logs = LogStore()
        self.metrics = MetricsStore(settings.metrics_seconds, settings.gpu_usage)
        self.events = EventLog(self.project_id, settings.project)
        self.secrets = ProjectSecrets()
        self.runs: dict[str, Run] = {}
        self.named: dict[str, Run] = {}
        self.repos: dict[str, SaveRepoCredsRequest] = {}
        self.codes: dict[tuple[str, str], Path] = {}
        self.archives: dict[str, tuple[str, Path]] = {}
        self.fleets = FleetPool(settings.project, settings.inventory, settings.pace.instance)
        self.machines = Machines(settings.project, settings.inventory, self.fleets, settings.needs_fleet)
        self.volumes = VolumePool(
            settings.project, USERNAME, settings.inventory, settings.pace.instance, directory / "volumes"
        )
        transitions = Transitions(self.events)
        carrier = JobCarrier(
            self.machines,
            settings.pace,
            directory,
            self.logs,
            transitions,
            self.sources,
            SshHost(),
            self.metrics,
            scenarios,
            self.secrets,
            self.volumes,
        )
        self.engine = Engine(carrier, settings.pace, transitions)

    async def close(self) -> None:
        """End the runs, fleets and volumes, and kill everything that they started."""
        await self.engine.close()
        await self.fleets.close()
        await self.volumes.close()

    def require_project(self, name: str) -> None:
        """Raise ApiError 404 unless the project is the one of this server."""
        if name != self.settings.project:
            raise unknown_project()

    def add(self, run: Run) -> None:
        """Store a new run under its name; it replaces an earlier run of that name (PROTOCOL 1.4)."""
        if (old := self.named.get(run.name)) is not None:
            old.deleted = True
        self.runs[run.id] = run
        self.named[run.name] = run
        self.engine.start(run)

    def delete(self, run: Run) -> None:
        """Mark a run as deleted; it can still be read by its id."""
        run.deleted = True
        self.named.pop(run.name, None)

    def sources(self, run: Run) -> Sources:
        """Return the uploads that a run refers to; missing ones are left out."""
        spec = run.spec
        repo = self.repos.get(spec.repo_id or "")
        creds = repo.repo_creds if repo is not None else None
        archives = [
            (self.archives[str(one.id)][1], one.path)
            for one in spec.file_archives
            if str(one.id) in self.archives
        ]
        code = self.codes.get((spec.repo_id or "", spec.repo_code_hash or ""))
        return Sources(code, creds, archives)

    async def user(self) -> dict[str, Any]:
        """Return the user without secrets, as JSON data (PROTOCOL 1.2)."""
        public, _ = await self.keys.pair()
        return {
            "id": self.user_id,
            "username": USERNAME,
            "created_at": self.created_at,
            "global_role": "admin",
            "email": None,
            "active": True,
            "permissions": {"can_create_projects": True},
            "ssh_public_key": public,
        }

    async def project(self, with_members: bool) -> dict[str, Any]:
        """Return the project as JSON data (PROTOCOL 1.2)."""
        user = await self.user()
        member = {
            "user": user,
            "project_role": "admin",
            "permissions": {"can_manage_ssh_fleets": True, "can_manage_secrets": True},
        }
        return {
            "project_id": self.project_id,
            "project_name": self.settings.project,
            "owner": user,
            "created_at": self.created_at,
            # Like a real server that has only SSH fleets: they do not count as a configured backend.
            "backends": [],
            "members": [member] if with_members else [],
            "is_public": False,
            "templates_repo": None,
        }
