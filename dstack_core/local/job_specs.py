"""Job specs: the jobs that the server derives from a configuration (PROTOCOL 1.5, 3.2)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from dstack_core.local.mounts import job_volumes
from dstack_core.local.quantities import ResourcesSpec
from dstack_core.local.run_parts import Part, parts
from dstack_core.local.spec_parts import PortMapping
from dstack_core.local.specs import Configuration, RunSpec, ServiceConfiguration
from dstack_core.local.ssh_host import ADDRESS

DEFAULT_IMAGE = "dstackai/base:0.16-base-ubuntu24.04"
# The server's default for ``retry: true`` and for a retry without a duration (PROTOCOL 3.2).
_RETRY_SECONDS = 3600
_NODE_ADDRESS = re.compile(r"(?<!\$)\$\{\{\s*groups\[\d+\]\.(?:nodes|replicas)\[\d+\]\.IP_ADDRESS\s*\}\}")
_ALL_EVENTS = ["no-capacity", "interruption", "error"]


def _joined(commands: list[str]) -> str:
    # "a & && b" is not shell syntax, nor is a line that begins with "&&". So a command that ends with "&"
    # gets braces of its own, and the last line break of a YAML block is removed.
    return " && ".join(
        f"{{ {command} }}" if command.endswith("&") and not command.endswith("&&") else command
        for command in map(str.strip, commands)
    )


def _argv(configuration: Configuration, commands: list[str], image: str | None) -> list[str]:
    if configuration.entrypoint is not None:
        return [*shlex.split(configuration.entrypoint), *commands]
    if not commands:
        return []
    if configuration.shell is not None:
        shell = configuration.shell if "/" in configuration.shell else f"/bin/{configuration.shell}"
    else:
        shell = "/bin/bash" if image is None else "/bin/sh"
    # The real server also passes -i. Without it SIGINT reaches the foreground command, and no "exit" line is
    # printed. Every node has the same address here.
    return [shell, "-c", _NODE_ADDRESS.sub(ADDRESS, _joined(commands))]


def _user(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    user, _, group = text.partition(":")
    return {
        "uid": int(user) if user.isdigit() else None,
        "gid": int(group) if group.isdigit() else None,
        "username": None if user.isdigit() else user,
        "groupname": group if group and not group.isdigit() else None,
    }


def _retry(spec: RunSpec) -> dict[str, Any] | None:
    retry = spec.setting("retry")
    if retry is None or retry is False:
        return None
    if retry is True:
        return {"on_events": _ALL_EVENTS, "duration": _RETRY_SECONDS}
    return {
        "on_events": retry.on_events or _ALL_EVENTS,
        "duration": _RETRY_SECONDS if retry.duration is None else retry.duration,
    }


def _seconds(value: int | str | None, default: int | None = None) -> int | None:
    if value == "off":
        return None
    return default if value is None else int(value)


def _requirements(spec: RunSpec, part: Part, multinode: bool) -> dict[str, Any]:
    resources = part.resources.model_dump(mode="json")
    resources["cpu"]["arch"] = resources["cpu"]["arch"] or "x86"
    return {
        "resources": resources,
        "max_price": spec.setting("max_price"),
        "spot": {"spot": True, "auto": None}.get(part.spot_policy or spec.setting("spot_policy"), False),
        "reservation": part.reservation or spec.setting("reservation"),
        "multinode": multinode,
        "backend_options": spec.setting("backend_options"),
    }


def _app_specs(ports: list[PortMapping]) -> list[dict[str, Any]]:
    kept = [port for port in ports if not 10000 <= port.container_port <= 10999]
    return [
        {
            "port": port.container_port,
            "map_to_port": port.local_port,
            "app_name": f"app_{number}",
            "url_path": None,
            "url_query_params": None,
        }
        for number, port in enumerate(kept)
    ]


def wanted_resources(job_spec: Mapping[str, Any]) -> ResourcesSpec:
    """Return the resources that a job requests."""
    return ResourcesSpec.model_validate(job_spec["requirements"]["resources"])


def build_job_specs(spec: RunSpec, run_name: str) -> list[dict[str, Any]]:
    """Return the job specs of a run as JSON data, one for each node and replica; `spec` has all defaults."""
    configuration = spec.configuration
    groups = parts(configuration)
    nodes = sum(group.nodes for group in groups)
    service_port = None
    if isinstance(configuration, ServiceConfiguration):
        # A replica is one job.
        nodes = 1
        service_port = configuration.port.container_port
    plain = spec.model_dump(mode="json")
    common = {
        "jobs_per_replica": nodes,
        "user": _user(configuration.user),
        "env": dict(configuration.env),
        "home_dir": configuration.home_dir,
        "single_branch": True if configuration.single_branch is None else configuration.single_branch,
        "max_duration": _seconds(spec.setting("max_duration")),
        "stop_duration": _seconds(spec.setting("stop_duration"), 300),
        "utilization_policy": plain["configuration"]["utilization_policy"],
        "registry_auth": plain["configuration"]["registry_auth"],
        "retry": _retry(spec),
        "ssh_key": None,
        "working_dir": configuration.working_dir,
        "repo_data": plain["repo_data"],
        "repo_code_hash": spec.repo_code_hash,
        "repo_dir": spec.repo_dir or "/workflow",
        "repo_exists_action": None,
        "file_archives": plain["file_archives"],
        "service_port": service_port,
        "probes": [],
    }
    jobs: list[dict[str, Any]] = []
    for index, part in enumerate(groups):
        own = {
            **common,
            "app_specs": _app_specs(part.ports),
            "commands": _argv(configuration, part.commands, part.image),
            "image_name": part.image or DEFAULT_IMAGE,
            "privileged": part.privileged,
            "requirements": _requirements(spec, part, nodes > 1),
        }
        for number in range(part.replicas * part.nodes):
            replica, node = (len(jobs), 0) if service_port is not None else (0, len(jobs))
            jobs.append(
                {
                    "replica_num": replica,
                    "job_num": node,
                    "job_name": f"{run_name}-{node}-{replica}",
                    "replica_group": part.name if service_port is not None else "0",
                    **own,
                    "volumes": job_volumes(plain["configuration"]["volumes"], node),
                    "node_group_index": index if service_port is None else 0,
                    "node_group_name": part.name if service_port is None else "0",
                    "node_group_job_index": number if service_port is None else 0,
                }
            )
    return jobs
