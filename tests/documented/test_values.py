"""Resources, GPU, RetryPolicy, SpotPolicy, RegistryAuth, RunStatus: every documented field and value."""

from __future__ import annotations

from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import RunStatus, SpotPolicy
from tests.documented.conftest import Bench

TASK = {"type": "task", "commands": ["true"]}


def resources(bench: Bench, **wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = bench.configuration(TASK, resources=dstack.Resources(**wanted))["resources"]
    return found


def test_resources_gpu_is_a_minimum(bench: Bench) -> None:
    gpu = resources(bench, gpu=dstack.GPU(memory="20GB"))["gpu"]
    assert gpu["memory"] == {"min": 20.0, "max": None}
    assert gpu["count"] == {"min": 1, "max": None}


@pytest.mark.parametrize(
    ("memory", "least", "most"), [("24GB", 24.0, None), (24576, 24.0, None), ("8GB..32GB", 8.0, 32.0)]
)
def test_resources_memory_takes_text_and_megabytes(
    bench: Bench, memory: int | str, least: float, most: float | None
) -> None:
    assert resources(bench, memory=memory)["memory"] == {"min": least, "max": most}


@pytest.mark.parametrize("shm_size", ["12GB", 12288])
def test_resources_shm_size_takes_text_and_megabytes(bench: Bench, shm_size: int | str) -> None:
    assert resources(bench, shm_size=shm_size)["shm_size"] == 12.0


def test_resources_request_nothing_by_default(bench: Bench) -> None:
    assert (dstack.Resources().gpu, dstack.Resources().memory, dstack.Resources().shm_size) == (
        None,
        None,
        None,
    )
    arrived = resources(bench)
    assert (arrived["gpu"]["count"]["min"], arrived["shm_size"], arrived["disk"]) == (0, None, None)


@pytest.mark.parametrize("name", ["A100", ["A100", "H100"]])
def test_gpu_name(bench: Bench, name: str | list[str]) -> None:
    wanted = [name] if isinstance(name, str) else name
    assert resources(bench, gpu=dstack.GPU(name=name))["gpu"]["name"] == wanted


@pytest.mark.parametrize(("count", "wire"), [(2, (2, None)), ("2..4", (2, 4)), (None, (1, None))])
def test_gpu_count_is_a_minimum(bench: Bench, count: int | str | None, wire: tuple[int, int | None]) -> None:
    arrived = resources(bench, gpu=dstack.GPU(count=count))["gpu"]["count"]
    assert (arrived["min"], arrived["max"]) == wire


@pytest.mark.parametrize(
    ("memory", "least", "most"), [("24GB", 24.0, None), (24576, 24.0, None), ("24GB..80GB", 24.0, 80.0)]
)
def test_gpu_memory_is_a_minimum(bench: Bench, memory: int | str, least: float, most: float | None) -> None:
    arrived = resources(bench, gpu=dstack.GPU(memory=memory))["gpu"]["memory"]
    assert arrived == {"min": least, "max": most}


def test_retry_policy_retry_is_off_by_default(bench: Bench) -> None:
    assert dstack.RetryPolicy().retry is False
    assert bench.configuration(TASK, retry_policy=dstack.RetryPolicy()).get("retry") is None


@pytest.mark.parametrize(("limit", "seconds"), [("3d", 259200), ("12h", 43200), (90, 90), (None, 3600)])
def test_retry_policy_waits_for_capacity_up_to_its_limit(
    bench: Bench, limit: int | str | None, seconds: int
) -> None:
    retry = bench.configuration(TASK, retry_policy=dstack.RetryPolicy(retry=True, limit=limit))["retry"]
    assert retry == {"on_events": ["no-capacity"], "duration": seconds}


@pytest.mark.parametrize("retry", ["true", "yes", True])
def test_retry_policy_retry_takes_the_documented_text_too(retry: Any) -> None:
    assert dstack.RetryPolicy(retry=retry).retry is True


@pytest.mark.parametrize(
    ("policy", "wire"),
    [
        (SpotPolicy.AUTO, "auto"),
        (SpotPolicy.SPOT, "spot"),
        (SpotPolicy.ON_DEMAND, "on-demand"),
        (SpotPolicy.ON_DEMAN, "on-demand"),
        (SpotPolicy.ONDEMAND, "on-demand"),
        ("spot", "spot"),
    ],
)
def test_spot_policy_values(bench: Bench, policy: SpotPolicy | str, wire: str) -> None:
    assert bench.configuration(TASK, spot_policy=policy)["spot_policy"] == wire


def test_registry_auth_username_and_password(bench: Bench) -> None:
    auth = dstack.RegistryAuth(username="me", password="s3cr3t")
    arrived = bench.configuration(dstack.Task(image="private", commands=["true"], registry_auth=auth))
    assert arrived["registry_auth"] == {"username": "me", "password": "s3cr3t"}
    assert "s3cr3t" not in repr(auth)


@pytest.mark.parametrize("missing", ["username", "password"])
def test_registry_auth_needs_both(missing: str) -> None:
    given: dict[str, Any] = {"username": "me", "password": "x"}
    del given[missing]
    with pytest.raises(
        dstack.ConfigurationError, match=rf"RegistryAuth\.{missing}: expected a value, got none"
    ):
        dstack.RegistryAuth(**given)


DOCUMENTED_STATUSES = [
    "PENDING",
    "SUBMITTED",
    "DOWNLOADING",
    "BUILDING",
    "RUNNING",
    "UPLOADING",
    "STOPPING",
    "STOPPED",
    "RESTARTING",
    "TERMINATING",
    "TERMINATED",
    "ABORTING",
    "ABORTED",
    "FAILED",
    "DONE",
]


@pytest.mark.parametrize("name", [*DOCUMENTED_STATUSES, "PROVISIONING"])
def test_run_status_values_are_lower_case_texts(name: str) -> None:
    assert "Run: " + RunStatus[name] == f"Run: {name.lower()}"


def test_run_status_has_no_other_values() -> None:
    assert {status.name for status in RunStatus} == {*DOCUMENTED_STATUSES, "PROVISIONING"}
