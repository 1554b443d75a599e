"""A run with ``debug_on_failure``: its task fails at once, a retry is a new run, and the reaper leaves it."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dstack import operators
from airflow_provider_dstack.errors import DstackRunFailed
from dstack_core import LogLines, Run
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths
from tests.provider_airflow.test_reaper import facts, is_stopped, one, train
from tests.provider_airflow.test_results import MODES, arguments
from tests.provider_airflow.tries import Store, Tries

LONG = "10m"
# Seconds that each reply of a slow server takes.
_SLOW = 1.0


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer without the pause that avoids a race with the scheduler; ``dag.test()`` has no such race."""
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


def the_run(server: LocalServer) -> Run:
    (run,) = server.client().runs.list(all=True)
    return run


@MODES
def test_the_task_fails_at_once_with_the_line_to_enter_and_the_run_is_held(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(arguments(deferrable, "echo started", "exit 3", debug_on_failure=LONG))
    output = capfd.readouterr().out
    run = the_run(server)
    assert ended.task_state == "failed"
    assert ("Pausing task as DEFERRED" in output) is deferrable
    assert f"failed: its command exited with status 3. See {run.url}" in output
    assert "Its container is held for 10 min, for at most 0.20 USD. " in output
    assert f"To open a shell in it: python -m dstack_core attach {run.name}" in output
    assert run.is_held()
    assert paths(server, "/runs/stop") == []
    run.stop()


@MODES
def test_a_status_that_skips_the_task_is_not_held(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    options: dict[str, Any] = {"debug_on_failure": LONG, "skip_on_exit_code": [7, 99]}
    ended = dag_runner.run(arguments(deferrable, "echo started", "exit 99", **options))
    assert ended.task_state == "skipped"
    outcome = the_run(server).wait(60, poll_interval=0.1)
    assert (outcome.exit_status, outcome.debug_seconds) == (99, 0)
    assert "held" not in capfd.readouterr().out


@MODES
def test_the_task_fails_with_the_line_to_enter_on_a_slow_server(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    server.faults.slow(_SLOW)
    ended = dag_runner.run(arguments(deferrable, "echo started", "exit 3", debug_on_failure=LONG))
    server.faults.clear()
    output = capfd.readouterr().out
    run = the_run(server)
    assert ended.task_state == "failed"
    assert f"failed: its command exited with status 3. See {run.url}" in output
    assert f"To open a shell in it: python -m dstack_core attach {run.name}" in output
    assert run.is_held()
    assert paths(server, "/runs/stop") == []
    run.stop()


@pytest.mark.parametrize("store", [True, False], ids=["store", "names alone"])
def test_the_next_try_is_a_new_run_while_the_first_is_held(server: LocalServer, store: bool) -> None:
    tries = Tries(server, Store() if store else None)
    with pytest.raises(DstackRunFailed, match="open a shell in it") as raised:
        tries.execute("exit 3", debug_on_failure=LONG)
    first = the_run(server)
    assert raised.value.outcome["debug_command"] == f"python -m dstack_core attach {first.name}"
    assert (raised.value.outcome["exit_status"], raised.value.outcome["debug_seconds"]) == (3, 600)
    tries.next_try()
    with pytest.raises(DstackRunFailed) as again:
        tries.execute("exit 4", debug_on_failure=LONG)
    second = tries.runs()[0]
    for error, run, status in ((raised, first, 3), (again, second, 4)):
        # Each hold has a name, a line to enter and a cost of its own.
        shown = error.value.outcome
        assert (shown["run_name"], shown["exit_status"]) == (run.name, status)
        assert shown["debug_command"].endswith(f" attach {run.name}")
        assert shown["debug_cost"] == pytest.approx(0.2)
        assert run.refresh().is_held()
    tries.next_try()
    result = tries.execute("true", debug_on_failure=LONG)
    assert (result["status"], result["debug_command"], result["debug_cost"]) == ("done", "", 0)
    assert len({result["run_name"], first.name, second.name}) == 3
    assert first.is_held()
    assert second.is_held()
    for run in (first, second):
        run.stop()


def test_a_run_whose_fixed_name_the_next_try_needs_ends_first(server: LocalServer) -> None:
    tries = Tries(server, Store(), run_name="train", debug_on_failure=LONG)
    with pytest.raises(DstackRunFailed):
        tries.execute("exit 3")
    first = the_run(server)
    tries.next_try()
    assert tries.execute("true")["run_name"] == "train"
    assert [run.id for run in tries.runs()] != [first.id]


@pytest.mark.parametrize(("state", "action"), [("failed", "left"), ("success", "stopped")])
def test_the_reaper_leaves_a_held_run_of_a_failed_task(server: LocalServer, state: str, action: str) -> None:
    with server.client() as client:
        run = client.runs.submit(
            {"type": "task", "commands": ["exit 3"]}, "held", marker=train(), debug_on_failure=LONG
        )
        run.wait(poll_interval=0.1)
        finding = one(client, facts(state))
        assert (finding.action, is_stopped(run)) == (action, action == "stopped")
        if action == "left":
            assert finding.reason == "its container is held for a shell (debug_on_failure)"
        run.stop()


def test_the_reaper_stops_a_run_that_outlives_its_hold(server: LocalServer) -> None:
    reported = [
        '{"kind":"held","exit_status":3,"seconds":1,"done":"/tmp/done"}',
        '{"kind":"released","seconds":1}',
    ]
    commands = [*(f"echo '::dstack::{message}'" for message in reported), "echo shown", "sleep 600"]
    with server.client() as client:
        configuration: dict[str, Any] = {"type": "task", "commands": commands}
        run = client.runs.submit(configuration, "over", marker=train(), debug_on_failure=1)
        next(event for event in run.follow(through_hold=True) if isinstance(event, LogLines))
        assert one(client, facts("failed")).action == "stopped"
        assert is_stopped(run)


@pytest.mark.parametrize("commands", [["sleep 600"], ["sleep 600", "exit 3"]])
def test_the_reaper_stops_a_run_whose_commands_still_run(server: LocalServer, commands: list[str]) -> None:
    with server.client() as client:
        configuration: dict[str, Any] = {"type": "task", "commands": commands}
        run = client.runs.submit(configuration, "running", marker=train(), debug_on_failure=LONG)
        assert one(client, facts("failed")).action == "stopped"
        assert is_stopped(run)
