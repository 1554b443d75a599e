"""Every operation on fleets, volumes, secrets and gateways as a flow, for both clients alike.

As in ``_operations``, input is checked, and files are read, when a method is called and not when its flow
starts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from dstack_core._attach.keys import read_identity_file
from dstack_core._flow import fleets, volumes
from dstack_core._flow.queries import check_limit
from dstack_core._flow.retry import TimeLimit, within
from dstack_core._flow.steps import Flow, Op, call
from dstack_core._operations import Operations
from dstack_core._wire.fleets import FleetApi, fleet_spec
from dstack_core._wire.project_items import ProjectItemsApi, volume_configuration
from dstack_core._wire.spec import run_spec
from dstack_core._wire.versions import needs_of
from dstack_core.configurations import FleetLike, VolumeLike, load_fleet, load_volume
from dstack_core.errors import ConfigurationError, WaitTimeoutError
from dstack_core.models.account import Gateway, Secret
from dstack_core.models.configurations import Task
from dstack_core.models.fleets import Fleet, FleetConfiguration, FleetPlan
from dstack_core.models.options import (
    SubmitOptions,
    check_choice,
    check_flags,
    check_resource_name,
    check_seconds,
)
from dstack_core.models.plan import Offers
from dstack_core.models.resources import Resources
from dstack_core.models.volumes import Volume

T = TypeVar("T")
# The server's own rule (secrets/create_or_update).
_SECRET_NAME = re.compile(r"[A-Za-z0-9-_]{1,200}")
_SECRETS = "project secrets"
_UNTIL = ("accepted", "deleted")
# What dstack requires by default (2 CPUs, 8 GB, 100 GB of disk) would hide machines.
_NO_LIMITS: Mapping[str, Any] = {
    "cpu": "1..", "memory": "0.1..", "disk": None, "gpu": {"count": "0.."},
}  # fmt: skip
# No run is made with it, and every server before 0.19.33 wants one.
_NO_KEY = "ssh-rsa AAAA offers"


class OfferOptions(TypedDict, total=False):
    """Which machines are wanted; None for one is the same as leaving it out."""

    resources: Resources | Mapping[str, Any] | str | int | None
    backends: Sequence[str] | None
    regions: Sequence[str] | None
    instance_types: Sequence[str] | None
    fleets: Sequence[str] | None
    spot_policy: str | None
    max_price: float | None


@dataclass(frozen=True, slots=True)
class ResourceOperations:
    """The flows on what runs are placed on and mount; none of them does I/O of its own."""

    operations: Operations

    @property
    def _fleets(self) -> FleetApi:
        return FleetApi(self.operations.api)

    @property
    def _items(self) -> ProjectItemsApi:
        return ProjectItemsApi(self.operations.api)

    def plan_fleet(self, configuration: FleetLike) -> Flow[FleetPlan]:
        """Check the input now; the flow fetches what an apply would do."""
        loaded = _with_keys(load_fleet(configuration))
        spec = fleet_spec(loaded, name=check_resource_name(loaded.name, "fleet"), marker=None)

        def steps() -> Op[FleetPlan]:
            return (yield from call(self._fleets.get_plan(spec))).plan

        return self.operations.retried(steps(), _needs(loaded.model_dump()), ask_first=True)

    def apply_fleet(
        self, configuration: FleetLike, *, name: str | None, marker: str | None, retry_budget: float | None
    ) -> Flow[Fleet]:
        """Check the input and read keys now; the flow creates or updates the fleet."""
        check_seconds("retry_budget", retry_budget)
        loaded = _with_keys(load_fleet(configuration))
        steps = fleets.apply_fleet(
            self._fleets,
            self.operations.version_check,
            loaded,
            self.operations.budget(retry_budget),
            name=check_resource_name(name or loaded.name, "fleet"),
            marker=marker,
        )
        return self.operations.retried(steps, _needs(loaded.model_dump()), ask_first=True)

    def offers(self, wanted: OfferOptions, limit: int) -> Flow[Offers]:
        """Check the input now; the flow fetches the machines that the project could get."""
        check_limit(limit)
        given: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
        options: SubmitOptions = {
            "resources": given.pop("resources", _NO_LIMITS),
            "spot_policy": given.pop("spot_policy", None),
            "max_price": given.pop("max_price", None),
        }
        # A command and an image that stand for no run: servers take such a request as one for offers, and ask
        # neither fleets nor a registry.
        configuration = Task.model_validate({"commands": [":"], "image": "scratch", "user": "root", **given})
        spec = run_spec(configuration, options)
        versions = self.operations.version_check

        def steps() -> Op[Offers]:
            yield from versions.release()
            more: dict[str, Any] = {"max_offers": limit, "for_offers_only": True}
            plan = yield from call(
                self.operations.api.get_plan(
                    {**spec, "ssh_key_pub": _NO_KEY},
                    **{key: value for key, value in more.items() if not versions.lacks(key)},
                )
            )
            return Offers(plan.offers[:limit], plan.total_offers)

        return self.operations.retried(steps(), needs_of(spec), ask_first=True)

    def get_fleet(self, name: str) -> Flow[Fleet | None]:
        """Fetch a fleet, None if there is no such fleet."""

        def steps() -> Op[Fleet | None]:
            found = yield from call(self._fleets.get(name))
            return None if found is None else found.fleet

        return self.operations.retried(steps())

    def list_fleets(self) -> Flow[list[Fleet]]:
        """List the project's fleets."""
        return self.operations.retried(call(self._fleets.list()))

    def delete_fleet(
        self,
        name: str,
        *,
        instances: Sequence[int] | None,
        marker: str | None,
        until: str,
        timeout: float | None,
        wait_for_runs: bool = False,
    ) -> Flow[bool]:
        """Delete a fleet or machines of it."""
        check_choice("until", until, _UNTIL)
        check_flags(wait_for_runs=wait_for_runs)
        numbers = None if instances is None else _numbers(instances)
        flow = fleets.delete_fleet(
            self._fleets,
            name,
            instances=numbers,
            marker=marker,
            until_deleted=until == "deleted",
            wait_for_runs=wait_for_runs,
        )
        return self._limited(flow, timeout, f"Fleet {name} was not deleted within {_seconds(timeout)}")

    def wait_for_fleet(self, name: str, number: int, timeout: float | None) -> Flow[Fleet | None]:
        """Wait until so many machines of a fleet are ready."""
        seen: list[Fleet] = []
        flow = fleets.wait_for_machines(self._fleets, name, number, seen.append)
        machines = "1 ready machine" if number == 1 else f"{number} ready machines"
        what = f"Fleet {name} did not have {machines} within {_seconds(timeout)}"
        limited = self._limited(flow, timeout, what)

        def explained() -> Flow[Fleet | None]:
            try:
                return (yield from limited)
            except WaitTimeoutError as error:
                # The other one is of a server that does not answer: a smaller fleet would not help.
                if error.message != what:
                    raise
                advice = "Ask for less or pay more, or wait longer."
                raise WaitTimeoutError(f"{what}.{_machine_states(seen)} {advice}") from None

        return explained()

    def apply_volume(
        self, configuration: VolumeLike, *, name: str | None, retry_budget: float | None
    ) -> Flow[Volume]:
        """Check the input now; the flow creates the volume unless it exists."""
        check_seconds("retry_budget", retry_budget)
        loaded = load_volume(configuration)
        wire = volume_configuration(loaded, check_resource_name(name or loaded.name, "volume"))
        flow = volumes.apply_volume(self._items, wire, self.operations.budget(retry_budget))
        return self.operations.retried(flow, _needs(wire), ask_first=True)

    def get_volume(self, name: str) -> Flow[Volume | None]:
        """Fetch a volume, None if there is no such volume."""
        return self.operations.retried(call(self._items.get_volume(name)))

    def list_volumes(self) -> Flow[list[Volume]]:
        """List the project's volumes."""
        return self.operations.retried(call(self._items.list_volumes()))

    def wait_for_volume(self, name: str, timeout: float | None) -> Flow[Volume]:
        """Wait until a volume is active."""
        flow = volumes.wait_until_active(self._items, name)
        return self._limited(flow, timeout, f"Volume {name} was not active within {_seconds(timeout)}")

    def delete_volume(self, name: str, *, until: str, timeout: float | None) -> Flow[bool]:
        """Delete a volume with its data."""
        check_choice("until", until, _UNTIL)
        flow = volumes.delete_volume(self._items, name, until_deleted=until == "deleted")
        return self._limited(flow, timeout, f"Volume {name} was not deleted within {_seconds(timeout)}")

    def list_secrets(self) -> Flow[list[Secret]]:
        """List the names of the project's secrets."""
        return self.operations.retried(call(self._items.list_secrets()), [_SECRETS], ask_first=True)

    def set_secret(self, name: str, value: str) -> Flow[Secret]:
        """Create a secret or replace its value."""
        if not isinstance(name, str) or not _SECRET_NAME.fullmatch(name):
            raise ConfigurationError(
                f"name: expected 1 to 200 letters, digits, dashes and underscores for a secret, got {name!r}."
            )
        if not isinstance(value, str) or not value:
            # The value itself must not be shown.
            got = "an empty text" if value == "" else type(value).__name__
            raise ConfigurationError(f"value: expected a text for the secret {name}, got {got}.")
        flow = call(self._items.set_secret(name, value))
        return self.operations.retried(flow, [_SECRETS], ask_first=True)

    def delete_secret(self, name: str) -> Flow[bool]:
        """Delete a secret; whether there was one."""
        return self.operations.retried(call(self._items.delete_secret(name)), [_SECRETS], ask_first=True)

    def list_gateways(self) -> Flow[list[Gateway]]:
        """List the project's gateways."""
        return self.operations.retried(call(self._items.list_gateways()))

    def get_gateway(self, name: str) -> Flow[Gateway | None]:
        """Fetch a gateway, None if there is no such gateway."""
        return self.operations.retried(call(self._items.get_gateway(name)))

    def _limited(self, flow: Flow[T], timeout: float | None, what: str) -> Flow[T]:
        check_seconds("timeout", timeout, above=True)
        limit = None if timeout is None else TimeLimit(timeout, what, "", self.operations.clock)
        return within(self.operations.retried(flow), limit)


def _seconds(timeout: float | None) -> str:
    return "" if timeout is None else f"{timeout:g} s"


def _numbers(instances: Sequence[int]) -> list[int]:
    is_list = isinstance(instances, Sequence) and not isinstance(instances, str | bytes)
    if not is_list or not instances or any(not isinstance(each, int) or each < 0 for each in instances):
        raise ConfigurationError(
            f"instances: expected numbers of a fleet's machines such as [0, 2], got {instances!r}."
        )
    return list(instances)


def _needs(configuration: Mapping[str, Any]) -> list[str]:
    keys = ("tags", "backend_options", "auto_cleanup_duration")
    return [key for key in keys if configuration.get(key)]


def _with_keys(configuration: FleetConfiguration) -> FleetConfiguration:
    """Return the configuration with the keys that its ``identity_file`` entries name."""
    if configuration.ssh_config is None:
        return configuration
    return configuration.model_copy(update={"ssh_config": _read_keys(configuration.ssh_config)})


def _read_keys(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read_keys(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    filled = {key: _read_keys(each) for key, each in value.items()}
    path = filled.get("identity_file")
    if path is not None and filled.get("ssh_key") is None:
        key = read_identity_file(path, "ssh_config.identity_file")
        filled["ssh_key"] = {"public": key.public_line, "private": Path(path).expanduser().read_text()}
    return filled


def _machine_states(seen: Sequence[Fleet]) -> str:
    """Return how many machines of the fleet are in which status, and why, as the server had it last."""
    if not seen:
        return ""
    states = Counter(
        f"{one.status} ({one.termination_reason})" if one.termination_reason else one.status
        for one in seen[-1].instances
    )
    counts = ", ".join(f"{number} {state}" for state, number in states.items())
    why = f": {seen[-1].status_message}" if seen[-1].status_message else ""
    return f" Its machines: {counts}{why}." if counts else f" It has no machine yet{why}."
