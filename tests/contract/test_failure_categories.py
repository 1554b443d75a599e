"""Ends of real runs have the category that names the cause, on the embedded server and on a real one."""

from __future__ import annotations

import json
import subprocess

import pytest

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


def test_a_missing_secret(target: Target, client: dstack.Client) -> None:
    if target.kind == "local" or target.release < (0, 19, 17):
        pytest.skip("this server has no secrets")
    task = target.task("echo never", env={"TOKEN": "${{ secrets.not_there }}"})
    outcome = finish(target, client.runs.submit(task))
    assert outcome.category == "secret.missing", outcome
