"""What the real server refuses with status 400 beyond its schema, and the defaults that it fills in."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstack_core.local.errors import bad_request
from dstack_core.local.gpu_vendors import vendors_of
from dstack_core.local.groups import ReplicaGroup
from dstack_core.local.profiles import ProfileRetry
from dstack_core.local.quantities import GPUSpec, IntRange, ResourcesSpec
from dstack_core.local.run_parts import parts
from dstack_core.local.specs import (
    Configuration,
    RunSpec,
    ServiceConfiguration,
    TaskConfiguration,
    VirtualRepoData,
)

NAME_PATTERN = "^[a-z][a-z0-9-]{1,40}$"
# Limits of the 0.22.5 server. A value that passes here and not there would fail in production only.
_MOST_PROBES = 10
_LONGEST_PROBE = 300  # seconds
_LONGEST_WINDOW = 3600  # seconds
_REFERENCE = re.compile(r"(?<!\$)\$\{\{\s*([^}]+?)\s*\}\}")
# The default image is made for NVIDIA GPUs. Software for TPUs is installed with pip.
_NEED_NO_IMAGE = {"nvidia", "google"}


def check_spec(spec: RunSpec) -> None:
    """Raise ApiError 400 for what the schema cannot check."""
    if spec.run_name is not None and re.fullmatch(NAME_PATTERN, spec.run_name) is None:
        raise bad_request(f"Resource name should match regex '{NAME_PATTERN}'")
    retry = spec.setting("retry")
    if isinstance(retry, ProfileRetry) and retry.duration is not None and retry.duration < 0:
        raise bad_request("retry.duration cannot be negative")
    for mount in spec.configuration.volumes:
        if mount.path != "/" and re.fullmatch(r"(/[^/\0]*)*/[^/\0]+", mount.path) is None:
            raise bad_request(f"Invalid volume mount path: {mount.path}")
    if spec.repo_id is None and spec.repo_data is not None:
        raise bad_request("repo_data must not be set if repo_id is not set")
    if spec.repo_id is not None and spec.repo_data is None:
        raise bad_request("repo_id must not be set if repo_data is not set")
    policy = spec.setting("utilization_policy")
    if policy is not None and policy.time_window > _LONGEST_WINDOW:
        raise bad_request(f"Maximum utilization_policy.time_window is {_LONGEST_WINDOW}s")
    if isinstance(spec.configuration, ServiceConfiguration):
        _check_service(spec, spec.configuration)
    _check_addresses(spec.configuration)
    for resources, image, docker in _machines(spec.configuration):
        _check_image(resources, image, docker)


def _check_service(spec: RunSpec, service: ServiceConfiguration) -> None:
    probes = service.probes or []
    if len(probes) > _MOST_PROBES:
        raise bad_request(f"Cannot configure more than {_MOST_PROBES} probes")
    if any((probe.timeout or 0) > _LONGEST_PROBE for probe in probes):
        raise bad_request(f"Probe timeout cannot be longer than {_LONGEST_PROBE}s")
    dynamo = any(group.router and group.router.type == "dynamo" for group in service.groups or [])
    if dynamo and spec.setting("retry") is not None:
        raise bad_request("Retry cannot be configured for services with a Dynamo router replica group.")


def _group_references(text: str) -> list[str]:
    return [name for name in _REFERENCE.findall(text) if re.split(r"[.\[]", name)[0] == "groups"]


def _check_addresses(configuration: Configuration) -> None:
    """Refuse ``${{ groups[i].nodes[j].IP_ADDRESS }}`` of a node that does not exist."""
    if any(_group_references(text) for text in configuration.env.values()):
        raise bad_request("groups IP references are only supported in commands, not in `env`")
    groups = parts(configuration)
    member = "replicas" if isinstance(configuration, ServiceConfiguration) else "nodes"
    for command in (command for group in groups for command in group.commands):
        for name in _group_references(command):
            match = re.fullmatch(rf"groups\[(\d+)\]\.{member}\[(\d+)\]\.IP_ADDRESS", name)
            if match is None:
                raise bad_request(f"Illegal reference name: {name}")
            group, number = int(match[1]), int(match[2])
            if group >= len(groups) or number >= getattr(groups[group], member):
                raise bad_request(f"Invalid reference {name}: out of range")


def _machines(
    configuration: Configuration,
) -> Iterator[tuple[ResourcesSpec, str | None, bool | None]]:
    """Yield the resources that each group of jobs requests, its image, and whether it uses Docker."""
    groups = None
    if isinstance(configuration, TaskConfiguration | ServiceConfiguration):
        groups = configuration.groups
    if groups is None:
        yield configuration.resources, configuration.image, configuration.docker
    for group in groups or []:
        image, docker = configuration.image, configuration.docker
        if isinstance(group, ReplicaGroup):
            image = image if group.image is None else group.image
            docker = docker if group.docker is None else group.docker
        yield group.resources, image, docker


def _check_image(resources: ResourcesSpec, image: str | None, docker: bool | None) -> None:
    gpu = resources.gpu
    if image is None and not docker and gpu is not None and gpu.count.max != 0:
        named = {vendor for name in gpu.name or [] for vendor in vendors_of(name)}
        vendors = ({gpu.vendor} if gpu.vendor is not None else named) - _NEED_NO_IMAGE
        if vendors:
            raise bad_request(
                "`image` must be set when the requested accelerator is not supported by"
                f" the default image: {sorted(vendors)}"
            )
    if resources.cpu.arch == "arm":
        if docker:
            raise bad_request("`docker: true` is not supported on ARM CPU")
        if image is None:
            raise bad_request("`image` must be set when ARM CPU requested")


def with_defaults(spec: RunSpec, public_key: str) -> RunSpec:
    """Return the spec as the server stores it (PROTOCOL 1.4, `effective_run_spec`)."""
    spec = spec.model_copy(deep=True)
    spec.repo_id = "none" if spec.repo_id is None else spec.repo_id
    spec.repo_data = spec.repo_data or VirtualRepoData()
    spec.ssh_key_pub = public_key if spec.ssh_key_pub is None else spec.ssh_key_pub
    configuration = spec.configuration
    configuration.priority = configuration.priority or 0
    if isinstance(configuration, TaskConfiguration) and configuration.groups is None:
        configuration.nodes = configuration.nodes or 1
    _fill_gpu(configuration.resources, configuration.image, configuration.docker)
    for resources, image, docker in _machines(configuration):
        _fill_gpu(resources, image, docker)
    return spec


def _fill_gpu(resources: ResourcesSpec, image: str | None, docker: bool | None) -> None:
    if resources.gpu is None:
        resources.gpu = GPUSpec(count=IntRange(min=0))
    gpu = resources.gpu
    if gpu.vendor is not None or gpu.count.max == 0:
        return
    if gpu.name:
        found = [vendors_of(name) for name in gpu.name]
        vendors = {vendor for one in found for vendor in one}
        gpu.vendor = vendors.pop() if len(vendors) == 1 and all(found) else None
    elif image is None and not docker:
        gpu.vendor = "nvidia"
