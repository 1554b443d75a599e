"""RunCollection and Run: every documented method, parameter, default and statement."""

from __future__ import annotations

import inspect
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from tests.documented.conftest import Bench

TASK = dstack.Task(commands=["true"])
LONG = dstack.Task(commands=["echo started", "sleep 600"])
DOCUMENTED = {
    "run_name": None,
    "resources": None,
    "spot_policy": None,
    "retry_policy": None,
    "max_duration": None,
    "max_price": None,
    "working_dir": None,
    "verify_ports": True,
}


def test_submit_has_the_documented_parameters_in_their_order() -> None:
    for kind in (dstack.RunCollection, dstack.AsyncRunCollection):
        parameters = list(inspect.signature(kind.submit).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert names == ["configuration", *DOCUMENTED, "backends"]
        assert {p.name: p.default for p in parameters if p.name in DOCUMENTED} == DOCUMENTED


@pytest.mark.parametrize("configuration", [TASK, dstack.Service(commands=["sleep 600"], port=80)])
def test_submit_takes_a_task_and_a_service(bench: Bench, configuration: dstack.Configuration) -> None:
    assert bench.configuration(configuration)["type"] == configuration.type


def test_submit_chooses_a_random_name(bench: Bench) -> None:
    names = {bench.client.runs.submit(TASK).name for _ in range(3)}
    assert len(names) == 3
    for name in names:
        assert re.fullmatch(r"task-[0-9a-f]{10}", name)


def test_submit_takes_a_name_and_replaces_a_finished_run_of_it(bench: Bench) -> None:
    name = f"train-{uuid.uuid4().hex[:8]}"
    first = bench.client.runs.submit(TASK, run_name=name)
    first.wait(timeout=60, poll_interval=0.1)
    second = bench.client.runs.submit(LONG, run_name=name)
    assert (second.name, second.id != first.id) == (name, True)
    with pytest.raises(
        dstack.RunNameTakenError,
        match=f"expected a name that is free, got .{name}.: a run of that name is active",
    ):
        bench.client.runs.submit(TASK, run_name=name)
    second.stop(abort=True)


@pytest.mark.parametrize(("duration", "wire"), [("2h", 7200), (90, 90), ("off", "off"), (None, None)])
def test_submit_max_duration(bench: Bench, duration: int | str | None, wire: int | str | None) -> None:
    assert bench.configuration(TASK, max_duration=duration)["max_duration"] == wire


@pytest.mark.parametrize(("price", "wire"), [(1.5, 1.5), (2, 2.0), (None, None)])
def test_submit_max_price(bench: Bench, price: float | None, wire: float | None) -> None:
    assert bench.configuration(TASK, max_price=price)["max_price"] == wire


def test_submit_backends(bench: Bench) -> None:
    assert bench.configuration(TASK, backends=["aws", "gcp"])["backends"] == ["aws", "gcp"]


def test_submit_without_a_spot_policy_leaves_the_choice_to_the_server(bench: Bench) -> None:
    assert bench.configuration(TASK)["spot_policy"] is None


def test_submit_working_dir_is_relative_to_the_repo_dir(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "here.txt").write_text("in src\n")
    (tmp_path / "here.txt").write_text("at the root\n")
    with dstack.Client.from_config(tmp_path, **bench.arguments()) as client:
        for working_dir, text in ((None, b"at the root\r\n"), ("src", b"in src\r\n")):
            run = client.runs.submit(dstack.Task(commands=["cat here.txt"]), working_dir=working_dir)
            run.wait(timeout=60, poll_interval=0.1)
            assert b"".join(run.logs()) == text


def test_plan_shows_offers_and_prices_and_submits_nothing(bench: Bench) -> None:
    before = len(bench.client.runs.list(all=True))
    plan = bench.client.runs.plan(TASK, resources=dstack.Resources(gpu=dstack.GPU(name="A100")))
    assert plan.total_offers == len(plan.offers) > 0
    assert plan.max_price_per_hour == max(offer.price_per_hour for offer in plan.offers) > 0
    assert len(bench.client.runs.list(all=True)) == before


def test_list_shows_unfinished_runs_or_else_the_latest_finished_one(bench: Bench) -> None:
    for left in bench.client.runs.list():
        left.stop(abort=True)
        left.wait(timeout=60, poll_interval=0.1)
    earlier, finished = bench.client.runs.submit(TASK), bench.client.runs.submit(TASK)
    for run in (earlier, finished):
        run.wait(timeout=60, poll_interval=0.1)
    assert [run.id for run in bench.client.runs.list()] == [finished.id]
    active = [bench.client.runs.submit(LONG) for _ in range(2)]
    assert [run.id for run in bench.client.runs.list()] == [run.id for run in reversed(active)]
    everything = [run.id for run in bench.client.runs.list(all=True)]
    assert everything[:4] == [active[1].id, active[0].id, finished.id, earlier.id], "newest first"
    for run in active:
        run.stop(abort=True)


def test_get_loads_a_run_by_name(bench: Bench) -> None:
    run = bench.client.runs.submit(TASK)
    found = bench.client.runs.get(run.name)
    assert found is not None
    assert found.id == run.id
    assert bench.client.runs.get("not-there") is None


def test_name_is_unique_within_the_project(bench: Bench) -> None:
    runs = bench.client.runs.list(all=True)
    assert len({run.name for run in runs}) == len(runs)


def test_status_is_polled_anew_and_can_be_concatenated_to_text(bench: Bench) -> None:
    run = bench.client.runs.submit(TASK)
    assert f"Run {run.name}: " + run.status() in {
        f"Run {run.name}: {status}" for status in ("submitted", "provisioning", "running", "done")
    }
    run.wait(timeout=60, poll_interval=0.1)
    assert run.status() == "done"
    assert run.status() is dstack.RunStatus.DONE


@pytest.mark.parametrize(
    ("arguments", "status"),
    [({}, "terminated"), ({"abort": False}, "terminated"), ({"abort": True}, "aborted")],
)
def test_stop_and_abort_end_the_run(bench: Bench, arguments: dict[str, Any], status: str) -> None:
    run = bench.client.runs.submit(LONG)
    for event in run.follow(poll_interval=0.1):
        if isinstance(event, dstack.LogLines):
            break
    run.stop(**arguments)
    assert run.wait(timeout=60, poll_interval=0.1).status == status
    assert run.status() == status


def test_logs_are_bytes_and_may_be_followed_to_the_end(bench: Bench) -> None:
    run = bench.client.runs.submit(dstack.Task(commands=["echo one", "sleep 0.5", "echo two"]))
    logs = list(run.logs(follow=True, poll_interval=0.1))
    assert all(isinstance(log, bytes) for log in logs)
    assert b"".join(logs) == b"one\r\ntwo\r\n"


def test_detach_without_attach_does_nothing(bench: Bench) -> None:
    run = bench.client.runs.submit(TASK)
    run.detach()
    run.detach()
