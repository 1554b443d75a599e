"""The behaviour a client may rely on, on the embedded server and on a real one."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import dstack_core as dstack
from dstack_core import Event, LogLines, Outcome, RunFinished, RunStatus, StatusChanged
from tests.contract.conftest import Target


def name() -> str:
    return f"ct-{uuid.uuid4().hex[:12]}"


def lines_of(events: Iterable[Event]) -> list[str]:
    return [line for event in events if isinstance(event, LogLines) for line in event.lines]


def follow(target: Target, run: dstack.Run) -> tuple[list[Event], Outcome]:
    events = list(run.follow(poll_interval=target.poll_interval))
    last = events[-1]
    assert isinstance(last, RunFinished)
    return events, last.outcome


def finish(target: Target, run: dstack.Run) -> Outcome:
    return run.wait(target.timeout, poll_interval=target.poll_interval)


def wait_until_running(target: Target, run: dstack.Run) -> None:
    for event in run.follow(poll_interval=target.poll_interval):
        if isinstance(event, LogLines):
            return
    pytest.fail(f"{run} ended before it wrote a line")


def test_a_task_runs_to_its_end_with_its_env_and_its_lines(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("echo hello from $WHO", "echo bye", env={"WHO": "the run"}))
    events, outcome = follow(target, run)
    assert lines_of(events) == ["hello from the run", "bye"]
    assert isinstance(events[-2], StatusChanged), "the last line precedes the final status"
    assert (outcome.status, outcome.exit_status, outcome.message) == (
        RunStatus.DONE,
        target.reported_exit_status(0),
        "finished",
    )
    assert outcome.succeeded
    assert (outcome.run_name, outcome.run_id, outcome.project) == (run.name, run.id, target.project)
    assert outcome.duration is not None
    assert outcome.duration > 0
    assert outcome.instance
    assert outcome.backend
    assert outcome.price_per_hour is not None
    assert outcome.url == f"{target.url}/projects/{target.project}/runs/{run.id}"
    assert run.refresh().outcome() == outcome
    assert b"".join(run.logs()) == b"hello from the run\r\nbye\r\n"


@pytest.mark.parametrize(("command", "exit_status"), [("exit 7", 7), ("no-such-command-here", 127)])
def test_a_failing_command_is_reported_with_its_exit_status(
    target: Target, client: dstack.Client, command: str, exit_status: int
) -> None:
    events, outcome = follow(target, client.runs.submit(target.task("echo before", command)))
    assert lines_of(events)[0] == "before"
    reported = target.reported_exit_status(exit_status)
    detail = " (command not found)" if exit_status == 127 else ""
    how = "with an error" if reported is None else f"with status {exit_status}{detail}"
    assert (outcome.status, outcome.exit_status) == (RunStatus.FAILED, reported)
    assert outcome.message == f"failed: its command exited {how}"
    with pytest.raises(dstack.RunFailedError, match=re.escape(how)):
        outcome.raise_for_status()


@pytest.mark.parametrize(
    ("abort", "status", "reason"),
    [(False, RunStatus.TERMINATED, "stopped_by_user"), (True, RunStatus.ABORTED, "aborted_by_user")],
)
def test_stop_and_abort(
    target: Target, client: dstack.Client, abort: bool, status: RunStatus, reason: str
) -> None:
    run = client.runs.submit(target.task("echo started", "sleep 600"))
    wait_until_running(target, run)
    outcome = target.stop(run, abort=abort)
    assert (outcome.status, outcome.reason, outcome.exit_status) == (status, reason, None)
    with pytest.raises(dstack.RunStoppedError):
        outcome.raise_for_status()
    run.stop()


def test_a_run_is_stopped_before_it_runs(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("sleep 600"))
    assert target.stop(run).status == RunStatus.TERMINATED


def test_max_duration_ends_a_run(target: Target, client: dstack.Client) -> None:
    outcome = finish(target, client.runs.submit(target.task("sleep 600"), max_duration="2s"))
    assert (outcome.status, outcome.reason) == (RunStatus.FAILED, "max_duration_exceeded")


def test_wait_gives_up_in_time_and_the_run_keeps_running(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("sleep 600"))
    with pytest.raises(dstack.WaitTimeoutError, match=rf"{run.name} had not finished after 0.5 s"):
        run.wait(0.5, poll_interval=0.1)
    assert not run.status().is_finished
    assert run.outcome() is None
    target.stop(run, abort=target.kind == "local")


def test_resubmitting_an_active_run(target: Target, client: dstack.Client) -> None:
    wanted = name()
    task = target.task("echo once", "sleep 600")
    run = client.runs.submit(task, run_name=wanted, marker="owner-a")
    assert client.runs.submit(task, run_name=wanted, marker="owner-a").id == run.id
    for other in ("owner-b", None):
        with pytest.raises(
            dstack.RunNameTakenError,
            match=f"expected a name that is free, got '{wanted}': a run of that name is active",
        ):
            client.runs.submit(task, run_name=wanted, marker=other)
    found = client.runs.get(wanted)
    assert found is not None
    assert (found.id, found.marker) == (run.id, "owner-a")
    target.stop(run)


def test_resubmitting_a_finished_run(target: Target, client: dstack.Client) -> None:
    wanted = name()
    first = client.runs.submit(target.task("echo one"), run_name=wanted, marker="owner-a")
    finish(target, first)
    assert client.runs.submit(target.task("echo one"), run_name=wanted, marker="owner-a").id == first.id
    second = client.runs.submit(target.task("echo two"), run_name=wanted, marker="owner-b")
    assert second.id != first.id
    events, _ = follow(target, second)
    assert lines_of(events) == ["two"]
    assert b"".join(first.logs()) == b"one\r\n", "a replaced run can still be read by its id"
    first.stop()
    assert first.refresh().status() == RunStatus.DONE
    assert [run.id for run in client.runs.list(all=True) if run.name == wanted] == [second.id]


def test_concurrent_submits_of_one_owner_make_one_run(target: Target, client: dstack.Client) -> None:
    wanted = name()
    with ThreadPoolExecutor(6) as pool:
        submits = [
            pool.submit(client.runs.submit, target.task("sleep 600"), run_name=wanted, marker="owner-a")
            for _ in range(6)
        ]
        runs = [submit.result() for submit in submits]
    assert len({run.id for run in runs}) == 1
    assert len([run for run in client.runs.list(all=True) if run.name == wanted]) == 1
    target.stop(runs[0])


def test_list_shows_the_active_runs_or_else_the_latest_one(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("sleep 600"))
    assert run.name in [active.name for active in client.runs.list()]
    target.stop(run)
    assert run.name not in [active.name for active in client.runs.list() if not active.outcome()]
    everything = client.runs.list(all=True)
    assert everything[0].name == run.name, "newest first"
    for left in client.runs.list():
        if left.outcome() is None:
            target.stop(left)
    assert [latest.name for latest in client.runs.list()] == [run.name]


def test_get_returns_none_for_a_missing_run(client: dstack.Client) -> None:
    assert client.runs.get(name()) is None


def test_stopping_a_missing_run_does_nothing(client: dstack.Client) -> None:
    client.runs.stop(name())


def test_a_wrong_token_is_refused_with_the_address(target: Target) -> None:
    with (
        target.client(user_token="s3cr3t-but-wrong") as client,
        pytest.raises(dstack.AuthenticationError, match=f"{target.url} refused the token") as caught,
    ):
        client.runs.submit(target.task("echo never"))
    assert "s3cr3t" not in str(caught.value)


def test_an_unknown_project_is_refused_by_name(target: Target) -> None:
    with (
        target.client(project_name="nope") as client,
        pytest.raises(dstack.ProjectNotFoundError, match="no project 'nope'"),
    ):
        client.runs.submit(target.task("echo never"))


@pytest.mark.parametrize("all", [False, True])
def test_an_unknown_project_has_no_list_of_runs(target: Target, all: bool) -> None:
    async def alist() -> None:
        async with target.async_client(project_name="nope") as client:
            await client.runs.list(all=all)

    with target.client(project_name="nope") as client:
        for ask in (lambda: client.runs.list(all=all), lambda: asyncio.run(alist())):
            with pytest.raises(dstack.ProjectNotFoundError, match="no project 'nope'"):
                ask()


def test_an_unknown_key_is_refused_by_the_server_and_nothing_is_submitted(
    target: Target, client: dstack.Client
) -> None:
    wanted = name()
    with pytest.raises(dstack.RequestRejectedError, match="nodez"):
        client.runs.submit(target.task("echo never", nodez=2), run_name=wanted)
    assert client.runs.get(wanted) is None


def test_five_thousand_lines_arrive_once_and_in_order(target: Target, client: dstack.Client) -> None:
    script = 'for i in $(seq 1 5000); do echo "line $i grüße 🚀"; done'
    events, outcome = follow(target, client.runs.submit(target.task(script)))
    assert outcome.succeeded
    assert lines_of(events) == [f"line {i} grüße 🚀" for i in range(1, 5001)]


def test_lines_arrive_while_the_run_is_active_and_resume_after_any_event(
    target: Target, client: dstack.Client
) -> None:
    run = client.runs.submit(target.task("for i in 1 2 3 4; do echo tick $i; sleep 0.7; done"))
    first: list[str] = []
    for event in run.follow(poll_interval=target.poll_interval):
        if isinstance(event, LogLines):
            first += event.lines
            progress = event.progress
            break
    assert not run.status().is_finished, "the first line arrived while the run was active"
    rest = lines_of(run.follow(progress, poll_interval=target.poll_interval))
    assert first + rest == [f"tick {i}" for i in range(1, 5)]


def test_a_plan_without_offers_is_not_an_error(target: Target, client: dstack.Client) -> None:
    resources = dstack.Resources(gpu=dstack.GPU(name="B200", count=64))
    plan = client.runs.plan(target.task("echo never"), resources=resources)
    assert (plan.offers, plan.total_offers, plan.max_price_per_hour) == ((), 0, None)


def test_a_run_without_capacity_fails_with_that_reason(target: Target, client: dstack.Client) -> None:
    resources = dstack.Resources(gpu=dstack.GPU(name="B200", count=64))
    outcome = finish(target, client.runs.submit(target.task("echo never"), resources=resources))
    assert (outcome.status, outcome.no_capacity, outcome.exit_status) == (RunStatus.FAILED, True, None)
    with pytest.raises(dstack.NoCapacityError, match="no capacity"):
        outcome.raise_for_status()


def test_commands_of_several_lines_follow_one_another(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(
        target.task("\nfor i in 1 2; do\n  echo line $i\ndone\n", "sleep 0.1 &\n", "echo end\n")
    )
    events, outcome = follow(target, run)
    assert outcome.succeeded
    assert [line for line in lines_of(events) if "line" in line or line == "end"] == [
        "line 1",
        "line 2",
        "end",
    ]


def test_a_yaml_file_runs_like_a_task(target: Target, client: dstack.Client, tmp_path: Path) -> None:
    wanted, path = name(), tmp_path / "hello.dstack.yml"
    path.write_text(yaml.safe_dump(target.task("echo from a file", name=wanted)))
    run = client.runs.submit(path)
    assert run.name == wanted
    assert lines_of(follow(target, run)[0]) == ["from a file"]


def test_the_code_of_repo_dir_arrives_and_commands_start_in_it(target: Target, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text("print('training')\n")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    (tmp_path / "weights.bin").write_bytes(b"x" * 1000)
    arguments = target.arguments()
    with dstack.Client.from_config(tmp_path, **arguments) as client:
        run = client.runs.submit(target.task("cat src/train.py", "ls *.bin || echo none"))
        events, _ = follow(target, run)
        lines = lines_of(events)
        assert (lines[0], lines[-1]) == ("print('training')", "none")
        (tmp_path / "big.dat").write_bytes(b"x" * 3_000_000)
        with pytest.raises(
            dstack.ConfigurationError, match=r"too big to upload: 3\.0 MB.*big\.dat \(3\.0 MB\)"
        ):
            client.runs.submit(target.task("echo never"))


def test_the_async_twin_does_the_same(target: Target) -> None:
    async def go() -> tuple[list[Event], Outcome, bool]:
        async with target.async_client() as client:
            run = await client.runs.submit(target.task("echo hello", "exit 3"))
            events = [event async for event in run.follow(poll_interval=target.poll_interval)]
            outcome = await run.wait(target.timeout, poll_interval=target.poll_interval)
            assert b"".join([chunk async for chunk in run.logs()]).startswith(b"hello\r\n")
            found = await client.runs.get(run.name)
            assert found is not None
            assert (await found.status()) == RunStatus.FAILED
            stopped = await client.runs.submit(target.task("sleep 600"))
            end = await target.stop_async(stopped)
            return events, outcome, end.status == RunStatus.TERMINATED

    events, outcome, stopped = asyncio.run(go())
    assert lines_of(events)[0] == "hello"
    assert (outcome.status, outcome.exit_status) == (RunStatus.FAILED, target.reported_exit_status(3))
    assert stopped
