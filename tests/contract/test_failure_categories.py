"""Ends of real runs have the category that names the cause, on the embedded server and on a real one."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest
import requests

import dstack_core as dstack
from dstack_core import Outcome
from dstack_core.integration import describe_failure
from tests.contract.conftest import Target
from tests.contract.test_contract import finish, wait_until_running
from tests.core.test_failure_categories import BY_REASON, OF_A_SUCCESS
from tests.rig.server import RealServer
from tests.rig.server_process import server_python

_REASONS = """
import json
from dstack._internal.core.models.runs import JobTerminationReason, RunTerminationReason
print(json.dumps([str(one.value) for kind in (JobTerminationReason, RunTerminationReason) for one in kind]))
"""


@pytest.mark.real
def test_every_reason_of_the_real_server_is_in_the_table(real_server: RealServer) -> None:
    python = server_python(".".join(map(str, real_server.release)))
    printed = subprocess.run([python, "-c", _REASONS], check=True, capture_output=True, timeout=120)
    reasons = set(json.loads(printed.stdout))
    assert len(reasons) > 15
    assert reasons - OF_A_SUCCESS <= BY_REASON.keys()


@pytest.mark.parametrize(
    ("command", "exit_status", "category"),
    [
        ("exit 3", 3, "user.exit"),
        ("no-such-command-here", 127, "user.not_found"),
        ("touch plain && ./plain", 126, "user.not_executable"),
        ("sh -c 'kill -9 $$'; exit $?", 137, "user.out_of_memory"),
        ("sh -c 'kill -SEGV $$'; exit $?", 139, "user.segfault"),
        ("sh -c 'kill -TERM $$'; exit $?", 143, "user.terminated"),
        ("kill -9 $$", -1, "user.killed"),
    ],
)
def test_an_exit(
    target: Target, client: dstack.Client, command: str, exit_status: int, category: str
) -> None:
    outcome = finish(target, client.runs.submit(target.task("cd /tmp", command)))
    reported = target.reported_exit_status(exit_status)
    # dstack 0.18.44 does not report how a command exited.
    assert (outcome.exit_status, outcome.category) == (reported, category if reported else "user.exit")
    assert "status -1" not in describe_failure(outcome)
    with pytest.raises(dstack.RunUserError):
        outcome.raise_for_status()


def test_a_limit(target: Target, client: dstack.Client) -> None:
    outcome = finish(target, client.runs.submit(target.task("sleep 600"), max_duration="2s"))
    assert outcome.category == "limit.max_duration"
    with pytest.raises(dstack.RunLimitError):
        outcome.raise_for_status()


@pytest.mark.parametrize(("abort", "category"), [(False, "stopped.by_user"), (True, "stopped.aborted")])
def test_a_stop(target: Target, client: dstack.Client, abort: bool, category: str) -> None:
    run = client.runs.submit(target.task("echo started", "sleep 600"))
    wait_until_running(target, run)
    assert target.stop(run, abort=abort).category == category


def test_no_machine(target: Target, client: dstack.Client) -> None:
    resources = dstack.Resources(gpu=dstack.GPU(name="B200", count=64))
    outcome = finish(target, client.runs.submit(target.task("echo never"), resources=resources))
    assert outcome.category in ("capacity.none", "capacity.fleet_full")
    assert Outcome.from_dict(outcome.to_dict()) == outcome
    with pytest.raises(dstack.NoCapacityError):
        outcome.raise_for_status()


# "Job status changed RUNNING -> TERMINATING. Termination reason: CONTAINER_EXITED_WITH_ERROR (a message)"
_REASON = re.compile(r"Termination reason: (\w+)(?: \((.*)\))?$", re.DOTALL)
# All else that events of a run or its job have; none of it gives a reason.
_NO_REASON = re.compile(
    r"Run submitted\. |Job created on |(Run|Job) status changed (\w+ -> \w+)$|Job (un)?assigned (to|from) instance|"
    r"Instance (created|provisioned) for job|Job became (un)?reachable|Graceful|Stopp"
)


@pytest.mark.parametrize("way", ["exit", "no machine", "limit", "stop"])
def test_events_have_no_reason_that_the_run_itself_lacks(
    target: Target, client: dstack.Client, way: str
) -> None:
    if target.release < (0, 20):
        pytest.skip("this server has no events")
    resources = dstack.Resources(gpu=dstack.GPU(name="B200", count=64)) if way == "no machine" else None
    command = "exit 3" if way == "exit" else "sleep 600"
    limit = "2s" if way == "limit" else None
    run = client.runs.submit(target.task(command), resources=resources, max_duration=limit)
    if way == "stop":
        target.stop(run)
    else:
        finish(target, run)
    reasons, messages = map(set, zip(*known_of(target, run), strict=True))
    events = [event.message for event in run.events()]
    found = [found for message in events if (found := _REASON.search(message))]
    assert found
    assert {one[1].lower() for one in found} <= reasons
    assert {one[2] for one in found} <= messages | {None}
    others = [message for message in events if not _REASON.search(message)]
    assert [message for message in others if not _NO_REASON.match(message)] == []


def known_of(target: Target, run: dstack.Run) -> Iterator[tuple[str | None, str | None]]:
    """Yield reason and message of the run and each submission of its jobs, as the server returns them."""
    reply = requests.post(
        f"{target.url}/api/project/{target.project}/runs/get",
        headers={"Authorization": f"Bearer {target.token}"},
        json={"run_name": run.name},
        timeout=60,
    ).json()
    yield reply["termination_reason"], None
    for job in reply["jobs"]:
        for each in job["job_submissions"]:
            yield each["termination_reason"], each["termination_reason_message"]


def test_a_missing_secret(target: Target, client: dstack.Client) -> None:
    if target.release < (0, 19, 17):
        pytest.skip("this server has no secrets")
    task = target.task("echo never", env={"TOKEN": "${{ secrets.not_there }}"})
    outcome = finish(target, client.runs.submit(task))
    assert outcome.category == "secret.missing", outcome
