"""One table gives every end of every server generation a name, a cause and a next step."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from dstack_core import (
    ConfigurationError,
    NoCapacityError,
    Outcome,
    RunError,
    RunFailedError,
    RunInfrastructureError,
    RunInterruptedError,
    RunLimitError,
    RunStatus,
    RunStoppedError,
    RunUserError,
    ServerUnreachableError,
)
from dstack_core._wire.runs import outcome_of, parse_run
from dstack_core.integration import (
    FAILURE_CATEGORIES,
    RETRIED_CATEGORIES,
    category_of,
    check_categories,
    describe_failure,
    in_categories,
    outcome_dict,
    outcome_rows,
)
from dstack_core.models.failure_categories import UNKNOWN, find_category
from tests.core.scripted import DATA

# The reasons that servers from 0.18.44 to 0.22.5 have, written down apart from the table.
BY_REASON = {
    "failed_to_start_due_to_no_capacity": "capacity.none",
    "interrupted_by_no_capacity": "spot.interrupted",
    "instance_unreachable": "machine.lost",
    "instance_access_revoked": "machine.access_revoked",
    "waiting_instance_limit_exceeded": "machine.start_timeout",
    "waiting_runner_limit_exceeded": "machine.start_timeout",
    "terminated_by_user": "stopped.by_user",
    "stopped_by_user": "stopped.by_user",
    "aborted_by_user": "stopped.aborted",
    "scaled_down": "stopped.scaled_down",
    "volume_error": "volume.error",
    "gateway_error": "gateway.error",
    "terminated_by_server": "server.terminated",
    "server_error": "server.internal",
    "inactivity_duration_exceeded": "limit.inactivity",
    "terminated_due_to_utilization_policy": "limit.idle_gpu",
    "max_duration_exceeded": "limit.max_duration",
    "log_quota_exceeded": "limit.log_quota",
    "retry_limit_exceeded": "limit.retries",
    "container_exited_with_error": "user.exit",
    "ports_binding_failed": "ports.busy",
    "creating_container_error": "container.create_failed",
    "executor_error": "runner.error",
    "job_failed": UNKNOWN,
}
OF_A_SUCCESS = {"all_jobs_done", "done_by_runner"}

# A message as a server, runner or shim writes it, with the reason it sends.
BY_TEXT = [
    ("failed_to_start_due_to_no_capacity", "No matching fleet found. Possible reasons: https://dstack.ai/docs", "capacity.no_fleet"),
    ("failed_to_start_due_to_no_capacity", "Failed to use specified fleets", "capacity.no_fleet"),
    ("failed_to_start_due_to_no_capacity", "Fleet is at capacity", "capacity.fleet_full"),
    ("failed_to_start_due_to_no_capacity", "Could not reuse any instance for this job", "capacity.fleet_full"),
    ("failed_to_start_due_to_no_capacity", "No offers matching the run requirements in fleet 'a'.", "capacity.none"),
    ("failed_to_start_due_to_no_capacity", "Failed to provision in fleet 'a': tried 3 of 9 offers, all failed.\nErrors: p5.48xlarge in aws/us-east-1: An error occurred (VcpuLimitExceeded).", "capacity.quota"),
    ("failed_to_start_due_to_no_capacity", "Failed to provision in fleet 'a': tried 1 of 1 offers, all failed.\nErrors: a2 in gcp/us-central1: Quota 'NVIDIA_A100_GPUS' exceeded.", "capacity.quota"),
    ("failed_to_start_due_to_no_capacity", "Failed to provision in fleet 'a': tried 1 of 1 offers, all failed.\nErrors: a2 in gcp/us-central1: ZONE_RESOURCE_POOL_EXHAUSTED.", "capacity.none"),
    ("interrupted_by_no_capacity", "Instance is unreachable", "spot.interrupted"),
    ("interrupted_by_no_capacity", "The selected instance was created before dstack 0.18.41 and does not support inactivity_duration", "machine.outdated"),
    ("volume_error", "Volume data not found", "volume.missing"),
    ("volume_error", "Failed to attach volume: the volume is attached elsewhere", "volume.error"),
    ("terminated_by_server", "Volume data not found", "volume.missing"),
    ("terminated_by_server", "Cannot mount volumes that are not active: data", "volume.error"),
    ("terminated_by_server", "Failed to attach volume", "volume.error"),
    ("terminated_by_server", "The job was inactive for 3601 seconds, exceeding the inactivity_duration of 3600 seconds", "limit.inactivity"),
    ("terminated_by_server", "The job GPU utilization below 10% for 1800 seconds", "limit.idle_gpu"),
    ("terminated_by_server", "Secrets interpolation error: Failed to interpolate due to missing vars: ['secrets.a']", "secret.missing"),
    ("terminated_by_server", "Unexpected server error: job_provisioning_data of an active job is None", "server.terminated"),
    ("container_exited_with_error", "Max duration exceeded", "limit.max_duration"),
    ("container_exited_with_error", "Failed to set up the repo (prepare git repo: checkout repo: clone repo: authentication required)", "code.clone_failed"),
    ("container_exited_with_error", "Failed to set up the repo ([repo.go:24 executor.setupRepo] [manager.go:76 Checkout] repository not found)", "code.clone_failed"),
    ("container_exited_with_error", "Failed to set up the repo (prepare git repo: apply diff: diff applier error for file a.py (): conflict)", "code.diff_failed"),
    ("container_exited_with_error", "Failed to set up the repo (repo dir is not empty: /workflow)", "code.setup_failed"),
    ("executor_error", "Failed to set up files (extract file archive 1: permission denied)", "code.setup_failed"),
    ("executor_error", "Failed to set job user (user: unknown user bob)", "container.setup_failed"),
    ("executor_error", "prepareVolumes error: failed to mount", "volume.error"),
    ("creating_container_error", "pullImage error: pull image: Error response from daemon: manifest for python:9 not found: manifest unknown", "image.not_found"),
    ("creating_container_error", "pullImage error: pull image: Error response from daemon: pull access denied for me/private, repository does not exist or may require 'docker login': denied", "registry.denied"),
    ("creating_container_error", "pullImage error: pull image: Error response from daemon: Head \"https://ghcr.io/v2/a/b\": unauthorized", "registry.denied"),
    ("creating_container_error", "pullImage error: failed pulling a:1: downloaded 5/9 bytes (1MB/s), errors: [\"failed to register layer: no space left on device\"]", "image.no_space"),
    ("creating_container_error", "pullImage error: pull image: no matching manifest for linux/arm64 in the manifest list entries", "image.wrong_platform"),
    ("creating_container_error", "pullImage error: image pull interrupted: downloaded 1 bytes out of 9 (1MB/s): context deadline exceeded", "image.pull_failed"),
    ("creating_container_error", "pullImage error: pull image: Error response from daemon: toomanyrequests: You have reached your pull rate limit.", "image.pull_failed"),
    ("creating_container_error", "createContainer error: create container: could not select device driver", "container.create_failed"),
    ("creating_container_error", "createContainer error: Bind for 0.0.0.0:80 failed: port is already allocated", "ports.busy"),
]  # fmt: skip

BY_EXIT = {
    1: "user.exit",
    3: "user.exit",
    126: "user.not_executable",
    127: "user.not_found",
    134: "user.aborted",
    137: "user.out_of_memory",
    139: "user.segfault",
    143: "user.terminated",
    130: "user.killed",
    -1: "user.killed",
}


def failed(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "run_name": "train",
        "run_id": "id-1",
        "project": "main",
        "status": RunStatus.FAILED,
        "exit_status": None,
        "reason": None,
        "message": "failed",
        "cost": 0.0,
        "duration": None,
        "instance": None,
        "backend": None,
        "region": None,
        "price_per_hour": None,
        "url": "http://server/runs/id-1",
    }
    return Outcome(**values | changes)


def ended(
    reason: str, message: str | None = None, exit_status: int | None = None, *, spot: bool = True
) -> Outcome:
    """Return the outcome of a recorded reply whose job ended like that."""
    body: Any = json.loads((DATA / "runs_get_failed_e2e_0.22.5.json").read_text())["response"]["json"]
    submission = body["jobs"][0]["job_submissions"][-1]
    submission |= {
        "termination_reason": reason,
        "termination_reason_message": message,
        "exit_status": exit_status,
    }
    submission["job_provisioning_data"]["instance_type"]["resources"]["spot"] = spot
    submission["job_runtime_data"]["offer"]["instance"]["resources"]["spot"] = spot
    return outcome_of(parse_run(body), "http://server/run")


def test_every_row_can_be_shown() -> None:
    names = [row.name for row in FAILURE_CATEGORIES]
    assert len(names) == len(set(names)) >= 35
    for row in FAILURE_CATEGORIES:
        assert row.name == UNKNOWN or re.fullmatch(r"[a-z]+\.[a-z_]+", row.name)
        assert row.kind in {
            "user", "capacity", "interruption", "limit", "infrastructure", "stopped", UNKNOWN
        }  # fmt: skip
        assert row.cause.endswith(".")
        assert row.next_step.endswith(".")
        assert max(len(row.cause), len(row.next_step)) < 150


@pytest.mark.parametrize(("reason", "category"), BY_REASON.items())
def test_a_reason_alone_has_one_category(reason: str, category: str) -> None:
    assert ended(reason).category == category


@pytest.mark.parametrize(("reason", "text", "category"), BY_TEXT)
def test_a_message_makes_it_precise(reason: str, text: str, category: str) -> None:
    outcome = ended(reason, text)
    assert outcome.category == category
    # What an older version of this package kept has no category, only the sentence that contains the message.
    older = {k: v for k, v in outcome.to_dict().items() if k not in ("category", "cause", "next_step")}
    assert Outcome.from_dict(older) == outcome


def test_every_category_but_those_of_callers_is_reached_by_a_servers_words() -> None:
    reached = {*BY_REASON.values(), *(category for _, _, category in BY_TEXT), *BY_EXIT.values()}
    assert {row.name for row in FAILURE_CATEGORIES} - reached == {"limit.max_cost", "server.unreachable"}
    assert find_category("max_cost_exceeded").name == "limit.max_cost"


@pytest.mark.parametrize(("exit_status", "category"), BY_EXIT.items())
def test_an_exit_status_has_one_category(exit_status: int, category: str) -> None:
    assert ended("container_exited_with_error", "", exit_status).category == category


def test_a_signal_is_not_called_a_status() -> None:
    killed = ended("container_exited_with_error", "", -1)
    assert killed.message == "failed: its command was killed by a signal (most likely out of memory)"
    shell = ended("container_exited_with_error", "", 137)
    assert shell.message == "failed: its command exited with status 137 (killed, most likely out of memory)"
    assert shell.cause == "The command was killed (SIGKILL), most likely because it ran out of memory."
    assert shell.next_step.startswith("Ask for more memory in resources")
    text = describe_failure(shell)
    assert text.count("out of memory") == 1
    assert text.endswith("(user.out_of_memory).")


def test_the_last_lines_of_a_container_do_not_pass_for_a_servers_message() -> None:
    for text in ("pullImage error: manifest unknown", "Fleet is at capacity", "it is Max duration exceeded"):
        assert ended("container_exited_with_error", text).category == "user.exit"


def test_an_old_server_has_one_reason_for_spot_and_other_machines() -> None:
    lost = ended("interrupted_by_no_capacity", spot=False)
    assert (lost.category, lost.no_capacity) == ("machine.lost", True)
    with pytest.raises(NoCapacityError) as caught:
        lost.raise_for_status()
    assert type(caught.value) is NoCapacityError, "code that catches it for this reason keeps working"


def test_an_unknown_reason_keeps_the_servers_word() -> None:
    outcome = ended("melted", "the GPU melted")
    assert (outcome.category, outcome.reason) == (UNKNOWN, "melted")
    assert outcome.message == "ended: melted (the GPU melted)"
    assert failed().category == UNKNOWN
    with pytest.raises(RunFailedError) as caught:
        outcome.raise_for_status()
    assert type(caught.value) is RunFailedError


def test_every_recorded_end_has_one_category() -> None:
    """The replies of five server generations, as they were recorded."""
    seen = {}
    for path in DATA.glob("*.json"):
        body = json.loads(path.read_text()).get("response", {}).get("json")
        for run in body if isinstance(body, list) else [body]:
            if isinstance(run, dict) and "run_spec" in run and "jobs" in run:
                snapshot = parse_run(run)
                if snapshot.status.is_finished:
                    outcome = outcome_of(snapshot, "http://server/run")
                    assert (outcome.category == "") == outcome.succeeded, path
                    assert outcome.category != UNKNOWN, path
                    seen[path.stem] = outcome.category
    # Servers distinguish a missing fleet from missing machines since 0.20.
    assert seen["runs_get_no_fleet_0.19.40"] == "capacity.none"
    assert seen["runs_get_no_fleet_0.22.5"] == "capacity.no_fleet"
    assert seen["runs_get_failed_e2e_0.18.44"] == seen["runs_get_failed_e2e_0.22.5"] == "user.exit"
    assert seen["runs_get_max_duration_0.22.5"] == "limit.max_duration"
    assert seen["runs_get_stopped_0.22.5"] == "stopped.by_user"
    assert seen["runs_get_aborted_0.22.5"] == "stopped.aborted"
    assert seen["runs_get_done_e2e_0.22.5"] == ""


def test_every_recorded_reason_is_in_the_table() -> None:
    texts = "".join(path.read_text() for path in DATA.glob("*.json") if not path.name.startswith("openapi"))
    reasons = set(re.findall(r'"termination_reason": "(\w+)"', texts))
    assert len(reasons) > 5
    assert reasons <= BY_REASON.keys() | OF_A_SUCCESS


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("container_exited_with_error", RunUserError),
        ("failed_to_start_due_to_no_capacity", NoCapacityError),
        ("interrupted_by_no_capacity", RunInterruptedError),
        ("max_duration_exceeded", RunLimitError),
        ("instance_unreachable", RunInfrastructureError),
        ("server_error", RunInfrastructureError),
    ],
)
def test_the_error_separates_whose_fault_it_is(reason: str, kind: type[RunError]) -> None:
    with pytest.raises(RunError) as caught:
        ended(reason).raise_for_status()
    assert type(caught.value) is kind
    twin = deepcopy(caught.value)
    assert (type(twin), twin.outcome) == (kind, caught.value.outcome)


def test_the_class_of_a_stopped_run_stays() -> None:
    stopped = failed(status=RunStatus.TERMINATED, reason="stopped_by_user")
    assert stopped.category == "stopped.by_user"
    # A limit that ends a run as terminated was a stop before there were categories.
    for outcome in (
        stopped,
        failed(status=RunStatus.TERMINATED, reason="inactivity_duration_exceeded"),
    ):
        with pytest.raises(RunStoppedError) as caught:
            outcome.raise_for_status()
        assert type(caught.value) is RunStoppedError


def test_a_category_crosses_versions() -> None:
    outcome = failed(reason="instance_unreachable")
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    newer = {
        **outcome.to_dict(),
        "category": "machine.melted",
        "cause": "It melted.",
        "next_step": "Cool it.",
    }
    read = Outcome.from_dict(newer)
    assert (read.category, read.cause, read.next_step) == ("machine.melted", "It melted.", "Cool it.")
    with pytest.raises(RunFailedError) as caught:
        read.raise_for_status()
    assert type(caught.value) is RunFailedError
    assert outcome_dict(read)["category"] == outcome_rows(read)["Category"] == "machine.melted"


def test_a_success_has_no_category() -> None:
    done = replace(failed(reason="server_error"), status=RunStatus.DONE)
    assert (done.category, done.cause, done.next_step) == ("", "", "")
    assert {"Category", "Cause", "Next step"}.isdisjoint(outcome_rows(done))


def test_a_group_stands_for_its_categories() -> None:
    assert in_categories("capacity.quota", ["spot", "capacity"])
    assert in_categories("image.pull_failed", RETRIED_CATEGORIES)
    assert not in_categories("image.not_found", RETRIED_CATEGORIES)
    assert not in_categories("", RETRIED_CATEGORIES)
    assert not in_categories("capacity_more.x", ["capacity"])
    for row in FAILURE_CATEGORIES:
        if row.kind in ("user", "limit", "stopped"):
            assert not in_categories(row.name, RETRIED_CATEGORIES), "trying again pays twice"
    assert check_categories("spot") == ("spot",)
    with pytest.raises(
        ConfigurationError, match=r"retry_on: expected failure .*, got \'capcity\'\. The groups are"
    ):
        check_categories(["spot", "capcity"], "retry_on")


def test_errors_have_a_category_too() -> None:
    with pytest.raises(RunError) as caught:
        ended("interrupted_by_no_capacity").raise_for_status()
    assert category_of(caught.value) == "spot.interrupted"
    assert category_of(ServerUnreachableError("no answer")) == "server.unreachable"
    assert category_of(ConfigurationError("wrong")) is None
    assert category_of(ValueError("wrong")) is None
