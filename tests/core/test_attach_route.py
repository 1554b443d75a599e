"""The route to a container, read from recorded replies of real servers (PROTOCOL 4)."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dstack_core import ConfigurationError, PortMapping, Service, Task
from dstack_core._wire.attach import AppPort, Hop, fixed_local_ports, parse_approach
from tests.core.scripted import recorded


def hops(data: dict[str, Any], node: int = 0) -> list[str]:
    route = parse_approach(data, node).route
    assert route is not None
    return [str(hop) for hop in route.hops]


def place(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["jobs"][0]["job_submissions"][-1]["job_provisioning_data"]
    return found


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            "runs_get_running_ssh_fleet_0.18.44",
            ["instance ubuntu@127.0.0.1:2352", "container root@localhost:40001"],
        ),
        (
            "runs_get_running_ssh_fleet_0.22.5",
            ["instance ubuntu@127.0.0.1:2311", "container root@localhost:40030"],
        ),
        ("runs_get_running_0.22.5", ["jump host slurm@127.0.0.1:2222", "container root@cpu00:10022"]),
        (
            "runs_get_running_sshproxy_0.22.5",
            ["sshproxy b14cbf972ab74badad316e3c76da6504_root@127.0.0.1:2299"],
        ),
    ],
)
def test_the_hops_of_recorded_runs(reply: str, expected: list[str]) -> None:
    assert hops(recorded(reply)) == expected


def test_only_the_sshproxy_is_checked_in_known_hosts_and_only_own_jump_hosts_use_own_keys() -> None:
    proxy = parse_approach(recorded("runs_get_running_sshproxy_0.22.5"), 0).route
    slurm = parse_approach(recorded("runs_get_running_0.22.5"), 0).route
    assert proxy is not None
    assert slurm is not None
    assert (proxy.through_sshproxy, slurm.through_sshproxy) == (True, False)
    assert not any(hop.own_identity or hop.check_host_key for hop in slurm.hops)
    behind = recorded("runs_get_running_ssh_fleet_0.22.5")
    place(behind)["ssh_proxy"] = {"hostname": "gate", "port": None, "username": "me"}
    route = parse_approach(behind, 0).route
    assert route is not None
    assert route.hops[0] == Hop("jump host", "gate", 22, "me", own_identity=True)
    assert [hop.own_identity for hop in route.hops] == [True, False, False]


def test_a_container_in_the_hosts_network_keeps_its_own_port_and_user() -> None:
    data = recorded("runs_get_running_ssh_fleet_0.22.5")
    runtime = data["jobs"][0]["job_submissions"][-1]["job_runtime_data"]
    runtime |= {"ports": None, "username": "worker"}
    assert hops(data)[-1] == "container worker@localhost:10022"


def test_ports_and_key_come_from_the_run() -> None:
    route = parse_approach(recorded("runs_get_running_0.22.5"), 0).route
    assert route is not None
    assert route.ports == (AppPort(18080, 18081), AppPort(18090, 18090), AppPort(18091, None))
    assert route.public_key == "ssh-rsa AAAA... admin"
    service = parse_approach(recorded("runs_get_service_running_0.22.5"), 0).route
    assert service is not None
    assert service.ports == (AppPort(18099, None),)


@pytest.mark.parametrize("status", ["pending", "submitted", "provisioning"])
def test_a_run_that_has_not_started_is_waited_for(status: str) -> None:
    approach = parse_approach(recorded("runs_get_running_ssh_fleet_0.22.5") | {"status": status}, 0)
    assert (approach.route, approach.waiting) == (None, True)


@pytest.mark.parametrize("status", ["submitted", "provisioning", "pulling"])
def test_a_job_that_has_not_started_is_waited_for_even_if_the_run_is_running(status: str) -> None:
    data = recorded("runs_get_running_ssh_fleet_0.22.5")
    data["jobs"][0]["job_submissions"][-1]["status"] = status
    approach = parse_approach(data, 0)
    assert (approach.route, approach.waiting) == (None, True)


@pytest.mark.parametrize("reply", ["done_e2e", "failed_e2e", "stopped", "aborted", "no_capacity"])
def test_a_run_that_has_ended_is_not_waited_for(reply: str) -> None:
    approach = parse_approach(recorded(f"runs_get_{reply}_0.22.5"), 0)
    assert (approach.route, approach.waiting) == (None, False)


def test_a_run_that_is_being_stopped_is_not_attached_to() -> None:
    data = recorded("runs_get_running_ssh_fleet_0.22.5") | {"status": "terminating"}
    approach = parse_approach(data, 0)
    assert (approach.route, approach.waiting) == (None, False)


def test_the_requested_node_of_the_lowest_running_replica_is_chosen() -> None:
    data = recorded("runs_get_running_ssh_fleet_0.22.5")
    first = data["jobs"][0]
    jobs = []
    for replica, node, status in [(2, 0, "running"), (1, 1, "running"), (1, 0, "running"), (0, 0, "failed")]:
        job = copy.deepcopy(first)
        job["job_spec"] |= {"replica_num": replica, "job_num": node}
        job["job_submissions"][-1] |= {"id": f"{replica}-{node}", "status": status}
        jobs.append(job)
    data["jobs"] = jobs
    zero, one = (parse_approach(data, node).route for node in (0, 1))
    assert zero is not None
    assert one is not None
    assert (zero.submission_id, one.submission_id) == ("1-0", "1-1")
    with pytest.raises(ConfigurationError, match=r"node: expected a node of run .* \(0, 1\), got 7"):
        parse_approach(data, 7)


def test_the_fixed_local_ports_are_those_a_task_names() -> None:
    ports: list[Any] = [8000, "8080:80", "*:81", "82", "83:10050", 10999]
    ports += [PortMapping(container_port=84), PortMapping(container_port=85, local_port=8085)]
    assert fixed_local_ports(Task(commands=["true"], ports=ports)) == {8000: 8000, 8080: 80, 82: 82, 8085: 85}
    assert fixed_local_ports(Task(commands=["true"])) == {}
    assert fixed_local_ports(Service(commands=["true"], port=80)) == {}


def test_a_local_port_used_twice_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"ports: expected each local port once, got 8080 twice.*\"\*:8080\""
    ):
        fixed_local_ports(Task(commands=["true"], ports=["8080:80", 8080]))
