"""Read from a run object how its container is reached (PROTOCOL 4).

The way depends on the backend: through the server's SSH proxy in one login; through the instance's own SSH
server and from there to the container's; or straight to the container, where the backend itself is one. A
jump host may precede the last two. All that is in the run object, in fields that every server version has or
omits, so the server's version need not be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstack_core._wire.runs import RunSnapshot, parse_run
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, PortMapping, Task
from dstack_core.models.statuses import RunStatus, job_status

# dstack's own ports inside a container (PROTOCOL 4): the runner's HTTP, the SSH server, and the range that is
# dropped from a task's ports.
RUNNER_PORT = 10999
_CONTAINER_SSH_PORT = 10022
_DEFAULT_SSH_PORT = 22
_RESERVED = range(10000, 11000)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Hop:
    """One SSH login on the way to a container.

    ``role`` is what messages call it. ``own_identity``: the user's own keys open it, not the run's.
    ``check_host_key``: its key is compared with the user's ``known_hosts``.
    """

    role: str
    hostname: str
    port: int
    username: str
    own_identity: bool = False
    check_host_key: bool = False

    def __str__(self) -> str:
        return f"{self.role} {self.username}@{self.hostname}:{self.port}"


@dataclass(frozen=True, slots=True)
class AppPort:
    """A port of the container and the local port wanted for it (None: the same or the next free)."""

    container_port: int
    local_port: int | None


@dataclass(frozen=True, slots=True)
class Route:
    """The way to one job's container: the logins in their order, the last is the container's.

    ``public_key`` is the one the run was submitted with; ``submission_id`` is the attempt at its end.
    """

    run_name: str
    submission_id: str
    hops: Sequence[Hop]
    ports: Sequence[AppPort]
    public_key: str

    @property
    def through_sshproxy(self) -> bool:
        """Return whether the server's SSH proxy decides which keys may pass."""
        return self.hops[0].check_host_key

    @property
    def is_on_this_machine(self) -> bool:
        """Return whether the host is this machine, so that a port of the run may be one of this machine's."""
        return self.hops[0].hostname in _LOOPBACK


@dataclass(frozen=True, slots=True)
class Approach:
    """A run as one poll showed it, and the way to its container if it has one now.

    ``waiting`` is whether it may have one later.
    """

    run: RunSnapshot
    route: Route | None
    waiting: bool


def parse_approach(data: Mapping[str, Any], node: int) -> Approach:
    """Read from a run object how the wanted node of its lowest running replica is reached.

    Raises ``ConfigurationError`` when the run has no such node.
    """
    run = parse_run(data)
    all_jobs = data.get("jobs") or []
    jobs = sorted((job for job in all_jobs if _number(job, "job_num") == node), key=_replica)
    if all_jobs and not jobs:
        nodes = ", ".join(str(number) for number in sorted({_number(job, "job_num") for job in all_jobs}))
        raise ConfigurationError(f"node: expected a node of run {run.name} ({nodes}), got {node}.")
    if run.status.is_before_start:
        return Approach(run, None, waiting=True)
    if run.status.is_ending:
        return Approach(run, None, waiting=False)
    route = next((route for job in jobs if (route := _route(data, job))), None)
    return Approach(run, route, waiting=route is None and any(_may_start(job) for job in jobs))


def fixed_local_ports(configuration: Configuration) -> dict[int, int]:
    """Return the container's port for each local port a task names, without dstack's own ports.

    A bare number is its own local port (PROTOCOL 3.2). Raises ``ConfigurationError`` when two container
    ports want the same one.
    """
    if not isinstance(configuration, Task):
        return {}
    fixed: dict[int, int] = {}
    for port in map(_mapping, configuration.ports or []):
        if port.local_port is None or port.container_port in _RESERVED:
            continue
        if port.local_port in fixed:
            raise ConfigurationError(
                f"ports: expected each local port once, got {port.local_port} twice. Write another one, or "
                f'"*:{port.container_port}" for any free one.'
            )
        fixed[port.local_port] = port.container_port
    return fixed


def _mapping(port: int | str | PortMapping) -> AppPort:
    if isinstance(port, PortMapping):
        return AppPort(port.container_port, port.local_port)
    local, _, container = str(port).rpartition(":")
    return AppPort(int(container), None if local == "*" else int(local or container))


def _route(data: Mapping[str, Any], job: Mapping[str, Any]) -> Route | None:
    """Return the way to a job's container, None while it has none."""
    submission = _last_submission(job)
    place = submission.get("job_provisioning_data") or {}
    if _status(submission) is not RunStatus.RUNNING or not place.get("hostname"):
        return None
    spec = job.get("job_spec") or {}
    return Route(
        run_name=data["run_spec"]["run_name"],
        submission_id=submission["id"],
        hops=_hops(job, spec, place, submission.get("job_runtime_data") or {}),
        ports=_ports(spec),
        public_key=(data["run_spec"].get("ssh_key_pub") or "").strip(),
    )


def _hops(
    job: Mapping[str, Any], spec: Mapping[str, Any], place: Mapping[str, Any], runtime: Mapping[str, Any]
) -> tuple[Hop, ...]:
    """Return the logins in their order (PROTOCOL 4.3, 4.4)."""
    connection = job.get("job_connection_info") or {}
    if connection.get("sshproxy_hostname"):
        port = connection.get("sshproxy_port") or _DEFAULT_SSH_PORT
        # The plain id would log in as the image's default user.
        username = f"{connection['sshproxy_upstream_id']}_root"
        hop = Hop("sshproxy", connection["sshproxy_hostname"], port, username, check_host_key=True)
        return (hop,)
    dockerized = place.get("dockerized", True)
    user = runtime.get("username") or (spec.get("user") or {}).get("username") or "root"
    hops = []
    proxy = place.get("ssh_proxy")
    if proxy:
        port = proxy.get("port") or _DEFAULT_SSH_PORT
        # The server has no key for a jump host in front of a user's own machines.
        hops.append(Hop("jump host", proxy["hostname"], port, proxy["username"], own_identity=dockerized))
    port = place.get("ssh_port") or _DEFAULT_SSH_PORT
    # Where there is no Docker (kubernetes, slurm and the like), this login is the container itself.
    if not dockerized:
        return (*hops, Hop("container", place["hostname"], port, user))
    # With a network of its own the container's SSH port has another number on the instance; keys are strings.
    ports = runtime.get("ports") or {}
    inner = int(ports.get(str(_CONTAINER_SSH_PORT), _CONTAINER_SSH_PORT))
    host = Hop("instance", place["hostname"], port, place.get("username") or "root")
    return (*hops, host, Hop("container", "localhost", inner, user))


def _ports(spec: Mapping[str, Any]) -> tuple[AppPort, ...]:
    ports = [AppPort(int(app["port"]), app.get("map_to_port")) for app in spec.get("app_specs") or []]
    service_port = spec.get("service_port")
    if service_port and service_port not in {port.container_port for port in ports}:
        ports.append(AppPort(int(service_port), None))
    return tuple(ports)


def _may_start(job: Mapping[str, Any]) -> bool:
    submission = _last_submission(job)
    return bool(submission) and _status(submission).is_before_start


def _status(submission: Mapping[str, Any]) -> RunStatus:
    return job_status(str(submission.get("status") or ""))


def _last_submission(job: Mapping[str, Any]) -> Mapping[str, Any]:
    # Each attempt of a job adds one; only the last can be running.
    submissions: Sequence[Mapping[str, Any]] = job.get("job_submissions") or [{}]
    return submissions[-1]


def _replica(job: Mapping[str, Any]) -> int:
    return _number(job, "replica_num")


def _number(job: Mapping[str, Any], key: str) -> int:
    return int((job.get("job_spec") or {}).get(key) or 0)
