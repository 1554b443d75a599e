"""Create and delete the fleet of one flow run: what the tasks and ``with dstack_fleet(...)`` share.

The problem: a fleet that its flow run leaves behind costs money, and a name may be another owner's.

The idea: the marker on a fleet names its flow run, as on runs. Another execution of the flow run computes the
same name and marker and finds its fleet; hooks and reaper know from the marker whose fleet it is
(``_orphaned_resources``). A fleet with ``keep=True`` has a marker without a flow run, by its name alone:
every flow that keeps a fleet of that name means the same one, and no hook and no reaper deletes it.

The invariants: what ends a creation early deletes the fleet again. A deletion never touches a fleet with
another marker, and raises no error of a server at the end of a ``with``: the flow's own end counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from prefect_dstack._checks import check_seconds, check_switches
from prefect_dstack._names import Owner
from prefect_dstack._resource_names import identify_resource
from prefect_dstack._waits import Waits, run_logger

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Client, Fleet, FleetConfiguration, FleetLike

# Clouds need 2 to 10 minutes for a machine; after a longer wait it rarely gets one.
CREATE_SECONDS = 1200.0
# The runs of a fleet that is deleted have ended, or are about to.
DELETE_SECONDS = 600.0
# Prefect kills an interrupted process 30 s after the signal, and its runs may have needed 22 s of that.
BEFORE_THE_KILL_SECONDS = 6.0
# These hold logins, and two fleets do not differ in them alone.
_NOT_DESCRIBED = {"ssh_config", "env"}
_KEPT_MARKER = "prefect:fleet/"
LEFT = "The reaper of prefect-dstack deletes it, where it is in use, or delete it by hand"


@dataclass(slots=True)
class FleetJob:
    """One fleet that is created here: checked, named, and created by nothing yet.

    ``timeout`` (seconds) limits the wait for its machines. ``machines`` (int) is how many it starts with.
    """

    configuration: FleetConfiguration
    name: str
    marker: str
    keep: bool
    timeout: float
    retry_budget: float
    waits: Waits
    logger: Any = field(repr=False)

    @property
    def machines(self) -> int:
        return self.configuration.machines_at_start

    @property
    def _applied(self) -> dict[str, Any]:
        return {"name": self.name, "marker": self.marker, "retry_budget": self.retry_budget}

    def create(self, client: Client) -> Fleet:
        """Create the fleet and wait until runs can use it."""
        self.waits.check()
        fleet = client.fleets.apply(self.configuration, **self._applied, sleep=self.waits.sleep)
        self._log_created(fleet)
        if self.machines:
            found = client.fleets.wait(self.name, self.machines, timeout=self.timeout, sleep=self.waits.sleep)
            fleet = self._usable(found)
        return self._ready(fleet)

    async def acreate(self, client: AsyncClient) -> Fleet:
        """Create the fleet: the twin of ``create``."""
        import asyncio

        await asyncio.to_thread(self.waits.check)
        fleet = await client.fleets.apply(self.configuration, **self._applied, sleep=self.waits.asleep)
        self._log_created(fleet)
        if self.machines:
            found = await client.fleets.wait(
                self.name, self.machines, timeout=self.timeout, sleep=self.waits.asleep
            )
            fleet = self._usable(found)
        return self._ready(fleet)

    def _log_created(self, fleet: Fleet) -> None:
        waits = f"; waiting for {_machines(self.machines)}" if self.machines else ""
        self.logger.info("Fleet %s is %s%s.", fleet.name, fleet.status, waits)

    def _usable(self, fleet: Fleet | None) -> Fleet:
        from dstack_core import ResourceFailedError

        if fleet is None or not fleet.is_active:
            reason = "it was deleted" if fleet is None else fleet.status_message or f"it is {fleet.status}"
            raise ResourceFailedError(f"Fleet {self.name} cannot be used: {reason}. Create it again.")
        return fleet

    def _ready(self, fleet: Fleet) -> Fleet:
        self._usable(fleet)
        self.logger.info(
            "Fleet %s can be used: %s, %.2f USD per hour.",
            fleet.name,
            _machines(sum(each.is_ready for each in fleet.instances)),
            fleet.price_per_hour,
        )
        return fleet


def prepare_fleet(
    configuration: FleetLike,
    owner: Owner,
    *,
    name: str | None,
    keep: bool,
    timeout: float,
    retry_budget: float,
) -> FleetJob:
    """Return the fleet to create. Raises ``ConfigurationError``; no request has been made."""
    from dstack_core import load_fleet

    check_switches(keep=keep)
    check_seconds(timeout=timeout, retry_budget=retry_budget)
    loaded = load_fleet(configuration)
    if name is not None and not isinstance(name, str):
        _refuse(f"name: expected the name of a fleet, got {type(name).__name__}.")
    if keep:
        fixed = name or loaded.name
        if not fixed:
            _refuse(
                "name: expected one for a fleet with keep=True, by which other flow runs find it, got none."
            )
        fleet_name, marker = fixed, f"{_KEPT_MARKER}{fixed}"
    else:
        spec = loaded.model_dump(mode="json", exclude=_NOT_DESCRIBED)
        ref = identify_resource(owner, "fleet", spec, name=name, prefix=loaded.name)
        fleet_name, marker = ref.name, ref.marker
    return FleetJob(loaded, fleet_name, marker, keep, timeout, retry_budget, Waits(owner), run_logger())


def described(configuration: FleetLike) -> str:
    """Return what equal fleets of one flow have in common. Raises ``ConfigurationError``."""
    from dstack_core import load_fleet

    return repr(load_fleet(configuration).model_dump(mode="json", exclude=_NOT_DESCRIBED))


def fleet_info(fleet: Fleet) -> dict[str, Any]:
    """Return a fleet as JSON-plain values."""
    return {
        "name": fleet.name,
        "fleet_id": fleet.id,
        "status": fleet.status,
        "marker": fleet.marker,
        "machines": [each.name for each in fleet.instances if each.is_ready],
        "price_per_hour": fleet.price_per_hour,
    }


def name_and_marker(kind: str, given: object) -> tuple[str, str | None]:
    """Return those of what ``create_fleet`` (or, by ``kind``, ``create_volume``) returned, or of a name.

    A name has no marker. Raises ``ConfigurationError``.
    """
    name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", given)
    marker = given.get("marker") if isinstance(given, Mapping) else getattr(given, "marker", None)
    if not isinstance(name, str) or not name:
        _refuse(f"{kind}: expected a name, or what create_{kind} returned, got {given!r}.")
    return name, marker if isinstance(marker, str) else None


def log_deleted(what: str, name: str, found: bool) -> bool:
    """Log what became of a resource that a task was to delete; return ``found``."""
    run_logger().info("%s %s %s.", what, name, "is deleted" if found else "does not exist")
    return found


def _machines(number: int) -> str:
    return "1 machine" if number == 1 else f"{number} machines"


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
