"""Job specs: what the server makes of a configuration (PROTOCOL 1.5, 3.2)."""

from __future__ import annotations

import shlex
from typing import Any

from dstack_core.local.specs import (
    Configuration,
    DevEnvironmentConfiguration,
    RunSpec,
    ServiceConfiguration,
    TaskConfiguration,
)

DEFAULT_IMAGE = "dstackai/base:0.16-base-ubuntu24.04"
_RETRY_SECONDS = 3600
_ALL_EVENTS = ["no-capacity", "interruption", "error"]


def _joined(commands: list[str]) -> str:
    # Neither "a & && b" nor a line that begins with "&&" is shell syntax: a command sent to the background
    # gets its own braces, and a block of YAML text loses its last line end.
    return " && ".join(
        f"{{ {command} }}" if command.endswith("&") and not command.endswith("&&") else command
        for command in map(str.strip, commands)
    )


def _argv(configuration: Configuration) -> list[str]:
    if isinstance(configuration, DevEnvironmentConfiguration):
        commands = [*configuration.init, "tail -f /dev/null"]
    elif isinstance(configuration, TaskConfiguration | ServiceConfiguration):
        commands = configuration.commands
    else:
        commands = []
    if configuration.entrypoint is not None:
        return [*shlex.split(configuration.entrypoint), *commands]
    if not commands:
        return []
    if configuration.shell is not None:
        shell = configuration.shell if "/" in configuration.shell else f"/bin/{configuration.shell}"
    else:
        shell = "/bin/bash" if configuration.image is None else "/bin/sh"
    # The real server adds -i. Without it SIGINT reaches the foreground command and no "exit" line is printed.
    return [shell, "-c", _joined(commands)]


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


def _requirements(spec: RunSpec, multinode: bool) -> dict[str, Any]:
    resources = spec.configuration.resources.model_dump(mode="json")
    resources["cpu"]["arch"] = resources["cpu"]["arch"] or "x86"
    return {
        "resources": resources,
        "max_price": spec.setting("max_price"),
        "spot": {"spot": True, "auto": None}.get(spec.setting("spot_policy"), False),
        "reservation": spec.setting("reservation"),
        "multinode": multinode,
        "backend_options": spec.setting("backend_options"),
    }


def _app_specs(configuration: Configuration) -> list[dict[str, Any]]:
    if not isinstance(configuration, TaskConfiguration | DevEnvironmentConfiguration):
        return []
    kept = [port for port in configuration.ports if not 10000 <= port.container_port <= 10999]
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


def build_job_specs(spec: RunSpec, run_name: str) -> list[dict[str, Any]]:
    """Return the job specs of a run as JSON data, one a node and replica; `spec` has all defaults."""
    configuration = spec.configuration
    nodes, replicas = 1, 1
    if isinstance(configuration, TaskConfiguration):
        nodes = configuration.nodes or 1
    elif isinstance(configuration, ServiceConfiguration) and configuration.replicas is not None:
        replicas = configuration.replicas.min or 0
    service_port = None
    if isinstance(configuration, ServiceConfiguration):
        service_port = configuration.port.container_port
    plain = spec.model_dump(mode="json")
    common = {
        "jobs_per_replica": nodes,
        "replica_group": "0",
        "app_specs": _app_specs(configuration),
        "user": _user(configuration.user),
        "commands": _argv(configuration),
        "env": dict(configuration.env),
        "home_dir": configuration.home_dir,
        "image_name": configuration.image or DEFAULT_IMAGE,
        "privileged": configuration.privileged,
        "single_branch": True if configuration.single_branch is None else configuration.single_branch,
        "max_duration": _seconds(spec.setting("max_duration")),
        "stop_duration": _seconds(spec.setting("stop_duration"), 300),
        "utilization_policy": plain["configuration"]["utilization_policy"],
        "registry_auth": plain["configuration"]["registry_auth"],
        "requirements": _requirements(spec, nodes > 1),
        "retry": _retry(spec),
        "volumes": plain["configuration"]["volumes"],
        "ssh_key": None,
        "working_dir": configuration.working_dir,
        "repo_data": plain["repo_data"],
        "repo_code_hash": spec.repo_code_hash,
        "repo_dir": spec.repo_dir or "/workflow",
        "repo_exists_action": None,
        "file_archives": plain["file_archives"],
        "service_port": service_port,
        "probes": [],
        "node_group_index": 0,
        "node_group_name": "0",
    }
    return [
        {
            "replica_num": replica,
            "job_num": node,
            "job_name": f"{run_name}-{node}-{replica}",
            **common,
            "node_group_job_index": node,
        }
        for replica in range(replicas)
        for node in range(nodes)
    ]
