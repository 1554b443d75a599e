"""The machines of jobs: one that fits, or the reason why none does; groups with machines of their own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.local.support import Api, ending, wait_until


@pytest.mark.parametrize(
    "resources",
    [
        *({"gpu": "B200"}, {"gpu": "A100:9"}, {"gpu": 9}, {"cpu": 1000}, {"gpu": "A100:141GB"}),
        # A bare size is exact, and the machine has GPUs of 80 GB.
        *({"gpu": "24GB"}, {"gpu": {"memory": 16}}, {"gpu": "16GB..40GB"}, {"gpu": "..40GB"}),
        *({"gpu": {"total_memory": "100GB"}}, {"gpu": {"total_memory": "81GB..", "count": 1}}),
    ],
)
def test_unmet_resources_fail_for_lack_of_capacity(api: Api, name: str, resources: Any) -> None:
    run = api.run(name, "true", resources=resources)
    assert ending(run)[3:] == ("failed_to_start_due_to_no_capacity", None)
    assert run["latest_job_submission"]["status_message"] == "no capacity"
    plan = api.ok("{p}/runs/get_plan", {"run_spec": {"configuration": run["run_spec"]["configuration"]}})
    assert plan["job_plans"][0]["offers"] == []


@pytest.mark.parametrize(
    "resources",
    [
        *({"gpu": "A100:80GB:8"}, {"gpu": "24GB.."}, {"gpu": {"name": "a100"}}, {"gpu": "80GB"}),
        *({"gpu": {"total_memory": "100GB..160GB"}}, {"gpu": "..80GB"}, {"gpu": 0}),
    ],
)
def test_met_resources_run(api: Api, name: str, resources: Any) -> None:
    run = api.run(name, "echo $DSTACK_GPUS_NUM", resources=resources)
    gpus = run["latest_job_submission"]["job_provisioning_data"]["instance_type"]["resources"]["gpus"]
    assert api.output(run).strip() == str(len(gpus))


def test_no_machine_on_offer_has_the_words_of_a_real_server(api: Api, name: str) -> None:
    run = api.run(name, "true", resources={"gpu": "16GB", "memory": "8GB..", "disk": "50GB"})
    message = run["latest_job_submission"]["termination_reason_message"]
    assert message.splitlines()[0] == "No offers matching the run requirements in fleet 'local'."
    assert len(message.splitlines()) == 2


def test_price_below_the_machines_fails(api: Api, name: str) -> None:
    assert ending(api.run(name, "true", max_price=0.5))[3] == "failed_to_start_due_to_no_capacity"
    assert api.run(f"{name}-ok", "true", max_price=1.5)["status"] == "done"


def test_groups_of_nodes_have_their_own_commands_and_gpus(api: Api, name: str) -> None:
    say = "echo $DSTACK_NODE_RANK of $DSTACK_NODES_NUM with $DSTACK_GPUS_PER_NODE at ${{ groups[1].nodes[0].IP_ADDRESS }}"
    groups = [
        {"name": "head", "commands": [f"echo head; {say}"]},
        {"nodes": 2, "commands": [say], "resources": {"gpu": "A100:2"}},
    ]
    run = api.run(name, groups=groups)
    assert run["status"] == "done"
    specs = [job["job_spec"] for job in run["jobs"]]
    assert [(one["node_group_name"], one["node_group_index"], one["node_group_job_index"]) for one in specs] == [
        ("head", 0, 0), ("1", 1, 0), ("1", 1, 1),
    ]  # fmt: skip
    assert [api.output(run, number) for number in range(3)] == [
        "head\r\n0 of 3 with 0 at 127.0.0.1\r\n",
        "1 of 3 with 2 at 127.0.0.1\r\n",
        "2 of 3 with 2 at 127.0.0.1\r\n",
    ]


def test_groups_of_replicas_run_side_by_side(api: Api, name: str) -> None:
    groups = [
        {"replicas": 2, "commands": ["echo few", "sleep 300"]},
        {"count": 1, "name": "b", "commands": ["echo b", "sleep 300"]},
    ]
    spec = {"run_name": name, "configuration": {"type": "service", "port": 8000, "groups": groups}}
    run = api.ok("{p}/runs/apply", {"plan": {"run_spec": spec}, "force": False})
    jobs = [job["job_spec"] for job in run["jobs"]]
    assert [(one["replica_num"], one["job_num"], one["replica_group"]) for one in jobs] == [
        (0, 0, "0"),
        (1, 0, "0"),
        (2, 0, "b"),
    ]
    wait_until(
        lambda: [api.output(api.get(name), number) for number in range(3)] == ["few\r\n", "few\r\n", "b\r\n"]
    )
    api.stop(name, abort=True)
