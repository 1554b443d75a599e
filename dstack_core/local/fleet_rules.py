"""What a 0.22.5 server refuses in a fleet specification, and what it can change in a fleet that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dstack_core.local.checks import NAME_PATTERN
from dstack_core.local.errors import ApiError, bad_request
from dstack_core.local.fleet_specs import FleetConfiguration, FleetSpec, SSHConfig, SSHHost, SSHKey
from dstack_core.local.quantities import GPUSpec, IntRange

_OF_SPEC = ("configuration", "configuration_path", "merged_profile")
_OF_CLOUD = (
    *("nodes", "reservation", "tags", "resources", "backends", "regions", "availability_zones"),
    *("instance_types", "spot_policy", "max_price"),
)
# The keys that only one kind of fleet has.
_OF_HOSTS_ONLY = ("env",)
_OF_CLOUD_ONLY = (
    *("reservation", "resources", "backends", "regions", "availability_zones", "instance_types"),
    *("spot_policy", "retry", "max_price", "idle_duration", "tags", "backend_options"),
)
_KEY_REFUSED = (
    "Unsupported key type. The key type should be RSA, ECDSA, or Ed25519 and should not be encrypted with "
    "passphrase."
)


def check_fleet(spec: FleetSpec) -> FleetSpec:
    """Return the spec as the server stores it; raises ApiError 400 for what the schema cannot check."""
    spec = spec.model_copy(deep=True)
    configuration = spec.configuration
    if configuration.name is not None and re.match(NAME_PATTERN, configuration.name) is None:
        raise bad_request(f"Resource name should match regex '{NAME_PATTERN}'")
    _check_kind(configuration)
    if configuration.ssh_config is not None:
        _check_hosts(configuration.ssh_config)
    return with_gpu(spec)


def with_gpu(spec: FleetSpec) -> FleetSpec:
    """Fill in the GPUs of a spec that requests resources without any, and return it."""
    resources = spec.configuration.resources
    if resources is not None and resources.gpu is None:
        resources.gpu = GPUSpec(count=IntRange(min=0))
    return spec


def _check_kind(configuration: FleetConfiguration) -> None:
    is_ssh = configuration.ssh_config is not None
    if not is_ssh and configuration.nodes is None:
        raise bad_request("No ssh_config or nodes specified")
    if is_ssh and configuration.nodes is not None:
        raise bad_request("ssh_config and nodes are mutually exclusive")
    foreign = _OF_CLOUD_ONLY if is_ssh else _OF_HOSTS_ONLY
    if given := [key for key in foreign if getattr(configuration, key) not in (None, {})]:
        kind = "SSH" if is_ssh else "Backend"
        raise bad_request(f"{kind} fleet configuration does not support the following fields: {given}")


def _check_hosts(ssh: SSHConfig) -> None:
    for name, host in ssh.names().items():
        own = host if isinstance(host, SSHHost) else SSHHost(hostname=name)
        if ssh.ssh_key is None and own.ssh_key is None:
            raise bad_request(f"No ssh key specified for host {name}")
        if ssh.user is None and own.user is None:
            raise bad_request(f"No ssh user specified for host {name}")
    for one in ssh.accesses():
        if one.ssh_key is not None:
            _check_key(one.ssh_key)
    addresses = [host for host in ssh.hosts if isinstance(host, SSHHost) and host.internal_ip is not None]
    if addresses and len(addresses) < len(ssh.hosts):
        raise bad_request("internal_ip must be specified for all hosts")
    if addresses and ssh.network is not None:
        raise bad_request("internal_ip is mutually exclusive with network")


def _check_key(key: SSHKey) -> None:
    if key.private is None:
        raise bad_request("Private key not provided")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    text = key.private.strip().encode() + b"\n"
    for load in (load_ssh_private_key, load_pem_private_key):
        try:
            load(text, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        return
    raise bad_request(_KEY_REFUSED)


def can_update(old: FleetSpec, new: FleetSpec) -> bool:
    """Return whether a fleet with one spec can be updated to the other."""
    try:
        check_update(old, new)
    except ApiError:
        return False
    return True


def check_update(old: FleetSpec, spec: FleetSpec) -> None:
    """Raise ApiError 400 if a fleet with one spec cannot be updated to the other."""
    changed = list(_changed(old, spec))
    if old.settings() != spec.settings():
        changed.append("merged_profile")
    _check(changed, _OF_SPEC)
    before, after = old.configuration, spec.configuration
    if before.ssh_config is None:
        if after.ssh_config is not None:
            raise bad_request("Fleet type changed from Cloud to SSH, cannot update")
        _check(list(_changed(before, after)), _OF_CLOUD)
        return
    if after.ssh_config is None:
        raise bad_request("Fleet type changed from SSH to Cloud, cannot update")
    _check(list(_changed(before, after)), ("ssh_config",))
    _check(list(_changed(before.ssh_config, after.ssh_config)), ("hosts",))
    hosts, new = before.ssh_config.names(), after.ssh_config.names()
    other = [name for name in hosts if name in new and _comparable(hosts[name]) != _comparable(new[name])]
    if other:
        raise bad_request(f"Hosts configuration changed, cannot update: {other}")


def _comparable(host: SSHHost | str) -> Any:
    """Return a host without the paths of key files, which differ between callers."""
    if isinstance(host, str):
        return host
    plain: dict[str, Any] = host.model_dump(exclude={"identity_file"})
    if plain["proxy_jump"] is not None:
        plain["proxy_jump"]["identity_file"] = ""
    return plain


def _changed(old: BaseModel, new: BaseModel) -> Iterator[str]:
    return (key for key in type(old).model_fields if getattr(old, key) != getattr(new, key))


def _check(changed: list[str], allowed: tuple[str, ...]) -> None:
    if not set(changed) <= set(allowed):
        raise bad_request(f"Failed to update fields {changed}. Can only update {list(allowed)}.")
