"""Fleets: groups of machines that runs are placed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, InstanceOf, field_validator

from dstack_core.errors import ConfigurationError
from dstack_core.models.base import Model
from dstack_core.models.options import read_duration
from dstack_core.models.plan import Offer
from dstack_core.models.profiles import read_price
from dstack_core.models.resource_statuses import FLEET, INSTANCE, Stage, stage_of
from dstack_core.models.resources import Resources
from dstack_core.models.statuses import SpotPolicy


class FleetConfiguration(Model):
    """The configuration of a fleet, as in a ``type: fleet`` file.

    Any other key is kept and passed through to the server, which checks it.

    Attributes:
        type: ``"fleet"``.
        name: The fleet's name.
        nodes: How many machines: an int, a range such as ``"0..2"``, or a mapping of ``min``, ``target`` and
            ``max``. With ``"0..2"`` machines are created when runs need them, at most two.
        ssh_config: The hosts of a fleet of your own machines, as in YAML. ``identity_file`` is read here.
        resources: ``Resources``, or a mapping or a short form as in YAML.
        placement: ``"any"``, or ``"cluster"`` for machines with fast network links between them.
        backends, regions, availability_zones, instance_types, reservation: Where machines come from.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``. Default: on-demand.
        max_price: The highest price of one machine, in USD per hour.
        idle_duration: How long a machine without runs is kept: an int in seconds, a str such as ``"10m"``,
            or ``"off"`` for no limit. Default: the server's, three days.
        retry: A bool, or a mapping of ``on_events`` and ``duration``.
        blocks: Into how many parts a machine is split, or ``"auto"``.
        tags: Tags of the cloud's resources (dict of str).
        env: Environment variables for the hosts of ``ssh_config``.

    Raises:
        ConfigurationError: A value is one that no server accepts.

    Example:
        ``FleetConfiguration(name="train", nodes="0..2", resources="24GB..", idle_duration="10m")``

    Source: PROTOCOL 1.2; the reference of ``fleet`` in dstack's documentation.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)
    _form = "a mapping as in a `type: fleet` file"

    type: Literal["fleet"] = "fleet"
    name: str | None = None
    nodes: int | str | Mapping[str, int | None] | None = None
    ssh_config: Mapping[str, Any] | None = None
    resources: InstanceOf[Resources] | Mapping[str, Any] | str | int | None = None
    placement: Literal["any", "cluster"] | None = None
    backends: list[str] | None = None
    regions: list[str] | None = None
    availability_zones: list[str] | None = None
    instance_types: list[str] | None = None
    reservation: str | None = None
    spot_policy: SpotPolicy | None = None
    max_price: float | None = None
    idle_duration: int | str | bool | None = None
    retry: bool | Mapping[str, Any] | None = None
    blocks: int | Literal["auto"] | None = None
    tags: dict[str, str] | None = None
    env: Mapping[str, str] | Sequence[str] | None = None

    @field_validator("nodes", mode="before")
    @classmethod
    def _check_nodes(cls, value: Any) -> Any:
        return check_nodes(value)

    @field_validator("max_price", mode="before")
    @classmethod
    def _check_price(cls, value: Any) -> Any:
        return None if value is None else read_price(value)

    @field_validator("idle_duration", mode="before")
    @classmethod
    def _check_duration(cls, value: Any) -> Any:
        return read_duration(value, below_zero=True)

    def check(self) -> None:
        """Raise ``ConfigurationError`` unless it has either ``nodes`` or ``ssh_config``."""
        if (self.nodes is None) == (self.ssh_config is None):
            raise ConfigurationError(
                'FleetConfiguration: expected nodes such as "0..2", or ssh_config for machines of your own, '
                f"got {'neither' if self.nodes is None else 'both'}."
            )

    @property
    def machines_at_start(self) -> int:
        """Return how many machines are created at once, or are hosts of your own."""
        if self.ssh_config is not None:
            return len(self.ssh_config.get("hosts") or ())
        if isinstance(self.nodes, Mapping):
            return self.nodes.get("target") or self.nodes.get("min") or 0
        first = str(self.nodes or 0).partition("..")[0].strip()
        return int(first or 0)

    @property
    def most_machines(self) -> int | None:
        """Return how many machines it can have, None without a limit."""
        return most_machines(self.model_dump())


def most_machines(configuration: Mapping[str, Any]) -> int | None:
    """Return how many machines a fleet with that configuration can have, None if it has no limit."""
    ssh_config, nodes = configuration.get("ssh_config"), configuration.get("nodes")
    if ssh_config is not None:
        return len(ssh_config.get("hosts") or ())
    if isinstance(nodes, Mapping):
        most: int | None = nodes.get("max")
        return most
    last = "" if nodes is None else str(nodes).rpartition("..")[2].strip()
    return int(last) if last else None


def check_machines(name: str, number: int, configuration: FleetConfiguration | Mapping[str, Any]) -> None:
    """Raise ``ConfigurationError`` for more machines than a fleet can have: a wait for them would not end.

    Args:
        name: What the error calls the number.
        number: How many machines are wanted.
        configuration: The fleet's configuration, also as a server has it.

    Raises:
        ConfigurationError: The fleet's ``nodes`` or hosts are fewer.

    Example:
        ``check_machines("machines", 3, FleetConfiguration(nodes="0..2"))``
    """
    wanted = configuration.model_dump() if isinstance(configuration, FleetConfiguration) else configuration
    most = most_machines(wanted)
    if most is not None and number > most:
        where = "hosts of ssh_config" if wanted.get("ssh_config") is not None else "nodes"
        raise ConfigurationError(
            f"{name}: expected at most {most}, as many as the fleet's {where}, got {number}. "
            "Wait for fewer, or give the fleet more."
        )


def check_nodes(value: Any) -> Any:
    """Return ``value`` if it is a number of nodes in one of its forms, or raise ``ValueError``."""
    expected = 'expected a number such as 2, a range such as "0..2", or a mapping of min and max'
    if value is None:
        return None
    if isinstance(value, Mapping):
        ends = [value.get("min"), value.get("target"), value.get("max")]
    elif isinstance(value, str):
        parts = [part.strip() for part in value.split("..")]
        if len(parts) > 2 or not any(parts) or not all(part.isdigit() for part in parts if part):
            raise ValueError(f"{expected}, got {value!r}")
        ends = [int(part) if part else None for part in parts]
    else:
        ends = [value]
    numbers = [end for end in ends if end is not None]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError(f"{expected}, got {value!r}")
    if numbers != sorted(numbers):
        raise ValueError(f"expected a minimum that is not above the maximum, got {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Instance:
    """One machine of a fleet.

    Attributes:
        id: The instance's id (a UUID).
        number: Its number within the fleet, which ``fleets.delete(..., instances=[...])`` takes.
        name: Its name, such as ``train-0``.
        status: The server's word: ``"pending"``, ``"provisioning"``, ``"idle"``, ``"busy"``,
            ``"terminating"`` or ``"terminated"``.
        backend, region: Where it is; None before it has a place.
        instance_type: The cloud's name of the type of machine, or None.
        price_per_hour: Its price in USD per hour, or None.
        hostname: Its address, or None.
        spot: Whether it is a spot instance, which can be taken away.
        gpu: The name of its GPUs, None if it has none.
        gpus: The number of its GPUs.
        gpu_memory: The memory of one GPU in bytes, None if it has none.
        unreachable: Whether the server has lost contact to it.
        created_at, finished_at: When it was created and when it ended (aware), or None.
        termination_reason: Why it ended, in the server's words, or None.
    """

    id: str
    number: int
    name: str
    status: str
    backend: str | None = None
    region: str | None = None
    instance_type: str | None = None
    price_per_hour: float | None = None
    hostname: str | None = None
    spot: bool = False
    gpu: str | None = None
    gpus: int = 0
    gpu_memory: int | None = None
    unreachable: bool = False
    created_at: datetime | None = None
    finished_at: datetime | None = None
    termination_reason: str | None = None

    @property
    def is_ready(self) -> bool:
        """Return whether runs can be placed on it, or are: it is idle or busy."""
        return stage_of(INSTANCE, self.status) is Stage.USABLE

    @property
    def has_ended(self) -> bool:
        """Return whether it is gone."""
        return stage_of(INSTANCE, self.status) is Stage.ENDED

    @property
    def is_charged(self) -> bool:
        """Return whether it costs something, as far as the status shows: it is neither ending nor gone."""
        return stage_of(INSTANCE, self.status) not in (Stage.ENDING, Stage.ENDED)


@dataclass(frozen=True, slots=True)
class Fleet:
    """A fleet as the server has it.

    Attributes:
        id: The fleet's id (a UUID).
        name: Its name.
        project: The project it belongs to.
        status: The server's word: ``"submitted"``, ``"active"``, ``"terminating"``, ``"terminated"`` or
            ``"failed"``.
        status_message: Why, in the server's words, or None.
        instances: Its machines.
        created_at: When it was created (aware).
        marker: The marker it was created with, or None.
        configuration: Its configuration as the server keeps it, without keys of SSH hosts.

    Source: PROTOCOL 1.2.
    """

    id: str
    name: str
    project: str
    status: str
    created_at: datetime
    instances: tuple[Instance, ...] = ()
    status_message: str | None = None
    marker: str | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_active(self) -> bool:
        """Return whether runs can be placed on it."""
        return stage_of(FLEET, self.status) is Stage.USABLE

    @property
    def is_terminating(self) -> bool:
        """Return whether it is being deleted; its name is taken until its machines are gone."""
        return stage_of(FLEET, self.status) is Stage.ENDING

    @property
    def has_ended(self) -> bool:
        """Return whether it is gone, or failed."""
        return stage_of(FLEET, self.status) is Stage.ENDED

    @property
    def price_per_hour(self) -> float:
        """Return what its machines cost together, in USD per hour."""
        prices = (each.price_per_hour for each in self.instances if each.is_charged)
        return sum(price for price in prices if price is not None)


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What an apply would do.

    Attributes:
        action: ``"create"`` or ``"update"``; None from servers that do not report it, before 0.19.
        current: The fleet that has that name now, or None.
        offers: Machines that the fleet could have, the cheapest first; none for SSH hosts.
        total_offers: How many offers there are in all.
        max_price_per_hour: The highest price of all offers in USD per hour, None without any.

    Source: PROTOCOL 1.2.
    """

    action: str | None
    current: Fleet | None
    offers: tuple[Offer, ...]
    total_offers: int
    max_price_per_hour: float | None
