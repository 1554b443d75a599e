"""Fleet specifications as the 0.22.5 server accepts and stores them."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dstack_core.local.profiles import (
    Backend,
    BackendOptions,
    Profile,
    ProfileParams,
    ProfileRetry,
    SpotPolicy,
    Tags,
)
from dstack_core.local.quantities import IdleSeconds, ResourcesSpec, Strict
from dstack_core.local.spec_parts import read_env

Blocks = Literal["auto"] | Annotated[int, Field(ge=1)]


class SSHKey(Strict):
    """A key; the private half is never shown."""

    public: str
    private: str | None = Field(default=None, repr=False)


class SSHProxy(Strict):
    """A host on the way to a host."""

    hostname: str
    port: int | None = None
    user: str
    identity_file: str
    ssh_key: SSHKey | None = None


def _check_internal_ip(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        address = ipaddress.ip_address(value)
    except ValueError as error:
        raise ValueError("Invalid IP address") from error
    if not address.is_private:
        raise ValueError("IP address is not private")
    return value


def _check_network(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError as error:
        raise ValueError(f"Failed to parse network: {value}") from error
    if not network.is_private:
        raise ValueError("Public network is specified when private network is required")
    return value


class SSHHost(Strict):
    """A host of an SSH fleet."""

    hostname: str
    port: int | None = None
    user: str | None = None
    identity_file: str | None = None
    proxy_jump: SSHProxy | None = None
    internal_ip: Annotated[str | None, AfterValidator(_check_internal_ip)] = None
    ssh_key: SSHKey | None = None
    blocks: Blocks | None = None


class SSHConfig(Strict):
    """The hosts of an SSH fleet and how to reach them."""

    user: str | None = None
    port: int | None = None
    identity_file: str | None = None
    ssh_key: SSHKey | None = None
    proxy_jump: SSHProxy | None = None
    hosts: list[SSHHost | str]
    network: Annotated[str | None, AfterValidator(_check_network)] = None

    def names(self) -> dict[str, SSHHost | str]:
        """Return the hosts by their name."""
        return {host if isinstance(host, str) else host.hostname: host for host in self.hosts}

    def accesses(self) -> list[SSHConfig | SSHHost]:
        """Return what may hold keys: the configuration itself, and hosts with keys of their own."""
        return [self, *(host for host in self.hosts if isinstance(host, SSHHost))]


class Nodes(Strict):
    """How many instances a fleet has; ``target`` are created with it."""

    min: int
    target: int
    max: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        value["min"] = 0 if value.get("min") is None else value["min"]
        value["target"] = value["min"] if value.get("target") is None else value["target"]
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min < 0:
            raise ValueError("min cannot be negative")
        if self.target < self.min:
            raise ValueError("target must not be be less than min")
        if self.max is not None and self.max < self.min:
            raise ValueError("max must not be less than min")
        if self.max is not None and self.max < self.target:
            raise ValueError("max must not be less than target")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        if found.get("target") == found.get("min"):
            found.pop("target", None)
        return found


def _read_nodes(value: Any) -> Any:
    if isinstance(value, str) and ".." in value:
        low, _, high = value.replace(" ", "").partition("..")
        return {"min": low or None, "max": high or None}
    return {"min": value, "max": value} if isinstance(value, str | int) else value


class FleetConfiguration(Strict):
    """A fleet, in the cloud (`nodes`) or of given hosts (`ssh_config`)."""

    type: Literal["fleet"] = "fleet"
    name: str | None = None
    placement: Literal["any", "cluster"] | None = None
    blocks: Blocks = 1
    nodes: Annotated[Nodes | None, BeforeValidator(_read_nodes)] = None
    reservation: str | None = None
    resources: ResourcesSpec | None = None
    backends: list[Backend] | None = None
    regions: list[str] | None = None
    availability_zones: list[str] | None = None
    instance_types: list[str] | None = None
    spot_policy: SpotPolicy | None = None
    retry: ProfileRetry | bool | None = None
    max_price: Annotated[float, Field(gt=0)] | None = None
    idle_duration: IdleSeconds = None
    tags: Tags = None
    backend_options: BackendOptions = None
    ssh_config: SSHConfig | None = None
    env: Annotated[dict[str, str], BeforeValidator(read_env)] = Field(default_factory=dict)


class FleetSpec(Strict):
    """The complete description of a fleet."""

    configuration: FleetConfiguration
    configuration_path: str | None = None
    profile: Profile
    autocreated: bool = False

    def setting(self, name: str) -> Any:
        """Return a scheduling key of the configuration, else of the profile, else None."""
        value = getattr(self.configuration, name, None)
        return getattr(self.profile, name) if value is None else value

    def settings(self) -> dict[str, Any]:
        """Return all scheduling keys, with the defaults that the server has for fleets."""
        found = {name: self.setting(name) for name in ProfileParams.model_fields}
        found["spot_policy"] = found["spot_policy"] or "on-demand"
        found["retry"] = False if found["retry"] is None else found["retry"]
        return {**found, "name": self.profile.name, "default": self.profile.default}

    def spot(self) -> bool | None:
        """Return whether its instances are spot machines; None: either."""
        return {"spot": True, "auto": None}.get(self.setting("spot_policy"), False)

    def shown(self) -> dict[str, Any]:
        """Return the spec as JSON data, without the keys of its hosts."""
        spec = self.model_copy(deep=True)
        if (ssh := spec.configuration.ssh_config) is not None:
            for one in ssh.accesses():
                one.ssh_key = None
                if one.proxy_jump is not None:
                    one.proxy_jump.ssh_key = None
        return spec.model_dump(mode="json")
