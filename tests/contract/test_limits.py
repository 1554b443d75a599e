"""What limits and survives: ``max_cost``, ``survive``, ``on_events`` and the sums of costs, on every server."""

from __future__ import annotations

import uuid
from decimal import Decimal
from pathlib import Path

import dstack_core as dstack
from dstack_core.integration import Attempt, Fallbacks, RunRef, follow_steps, newest_step, step_ref
from tests.contract.conftest import Target


def end_of(target: Target, run: dstack.Run) -> dstack.Outcome:
    return run.wait(target.timeout, poll_interval=target.poll_interval)


def test_a_run_below_its_cost_limit_is_not_touched(client: dstack.Client, target: Target) -> None:
    task = target.task('echo "limit $DSTACK_MAX_COST"', max_price=1.5)
    run = client.runs.submit(task, max_cost=20, marker=f"limits/{uuid.uuid4().hex}")
    outcome = end_of(target, run)
    assert (outcome.status, outcome.category) == (dstack.RunStatus.DONE, "")
    assert 0 <= outcome.cost < 20


def test_a_run_that_survives_is_a_plain_run_where_nothing_is_lost(
    client: dstack.Client, target: Target
) -> None:
    run = client.runs.submit(target.task("true"), survive=dstack.Survive(duration="1h", times=2))
    outcome = end_of(target, run)
    assert outcome.status == dstack.RunStatus.DONE
    assert [each.number for each in outcome.attempts] == [1]


def test_the_directory_of_the_checkpoints_reaches_the_commands(
    client: dstack.Client, target: Target, tmp_path: Path
) -> None:
    task = target.task('echo "kept in $DSTACK_CHECKPOINT"', volumes=[f"{tmp_path}:/data"])
    run = client.runs.submit(task, survive=dstack.Survive(checkpoint="/data/checkpoints"))
    assert end_of(target, run).status == dstack.RunStatus.DONE
    assert f"/data/checkpoints/{run.name}" in b"".join(run.logs()).decode()


def test_a_job_falls_back_to_a_run_of_its_own_and_any_process_finds_it(
    client: dstack.Client, target: Target
) -> None:
    ref = RunRef(f"steps-{uuid.uuid4().hex[:8]}", f"contract:{uuid.uuid4().hex}/1")
    fallbacks = Fallbacks([{"env": {"STEP": "two"}}], on_exit={3: "next"})
    task = target.task('echo "step ${STEP:-one}"; test "$STEP" = two || exit 3')
    for _ in range(2):
        lines: list[str] = []
        last: dstack.Event | None = None
        for last in follow_steps(client, task, Attempt(ref), fallbacks, poll_interval=target.poll_interval):
            found = last.lines if isinstance(last, dstack.LogLines) else ()
            # A real runner's shell also writes "exit".
            lines += [line for line in found if line.startswith("step")]
        assert isinstance(last, dstack.RunFinished)
        outcome = last.outcome
        if target.release < (0, 19, 9):
            # It reports no exit status.
            assert (outcome.status, outcome.run_name) == (dstack.RunStatus.FAILED, ref.name)
            assert newest_step(client, ref, fallbacks) == ref
            return
        assert (outcome.status, outcome.run_name) == (dstack.RunStatus.DONE, f"{ref.name}-s2")
        assert [each.exit_status for each in outcome.attempts][:1] == [3]
        assert lines == ["step one", "step two"]
    assert newest_step(client, ref, fallbacks) == step_ref(ref, 2)


def test_a_retry_policy_names_its_events(client: dstack.Client, target: Target) -> None:
    policy = dstack.RetryPolicy(on_events=["no-capacity", "interruption"], limit="1h")
    run = client.runs.submit(target.task("exit 3"), retry_policy=policy)
    assert end_of(target, run).status == dstack.RunStatus.FAILED


def test_costs_are_the_sum_of_the_servers_numbers(client: dstack.Client, target: Target) -> None:
    prefix = f"costs-{uuid.uuid4().hex}/"
    runs = [client.runs.submit(target.task("true"), marker=f"{prefix}{number}") for number in range(2)]
    outcomes = [end_of(target, run) for run in runs]
    (row,) = client.costs(by="user", marker_prefix=prefix)
    assert row.runs == 2
    assert row.cost == sum(Decimal(str(each.cost)) for each in outcomes)
    assert client.costs(marker_prefix=prefix, until="2020-01-01") == []
