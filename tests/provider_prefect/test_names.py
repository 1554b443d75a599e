"""Run names and markers."""

from __future__ import annotations

import re
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from dstack_core.integration import AttemptNames, RunRef
from prefect_dstack import run_task
from prefect_dstack._names import (
    Ordinals,
    Owner,
    flow_run_marker_prefix,
    former_machine_name,
    identify,
    machine_names,
    name_of_task,
    outlives_crash,
    owner_of,
    worker_marker_prefix,
)

NAME = re.compile(r"[a-z][a-z0-9-]{1,40}")
SPEC = {"configuration": {"type": "task", "commands": ["echo"]}}


def owner(task: str | None = None, flow: str | None = "f", count: int = 1, shares: bool = True) -> Owner:
    return Owner(task or str(uuid4()), flow, count, shares)


def named(who: Owner, ordinals: Ordinals, **options: object) -> AttemptNames:
    return identify(who, SPEC, on_crash="stop", ordinals=ordinals, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", [None, "train", "Train_LLaMA-70b finetune", "-9", "", "ü", "7b-model"])
@pytest.mark.parametrize("shares", [True, False])
def test_names_fit_the_servers_rule_in_every_attempt(prefix: str | None, shares: bool) -> None:
    who = Owner(str(uuid4()), str(uuid4()), 1, shares)
    identity = identify(who, SPEC, on_crash="stop", prefix=prefix, ordinals=Ordinals())
    for number in (1, 2, 99):
        assert NAME.fullmatch(identity.ref(number).name)


def test_names_and_markers_stay_as_they_are_for_runs_of_an_earlier_version() -> None:
    flow = "019b1234-aaaa-7000-8000-00000000000b"
    names = named(owner(flow=flow, count=2), Ordinals())
    marker = f"prefect:flow_run/{flow}/stop/80d7e3-0"
    assert names.ref(1) == RunRef("run-2fb9f64f", f"{marker}/1", generated=True)
    assert names.former_ref(1) == RunRef("pf-00000000000b-80d7e3-0", f"{marker}/1", generated=True)
    assert names.former_ref(2) == RunRef("pf-00000000000b-80d7e3-0-2", f"{marker}/2", generated=True)
    chosen = identify(
        owner(flow=flow, count=2),
        SPEC,
        on_crash="keep",
        prefix="Train_LLaMA-70b finetune",
        ordinals=Ordinals(),
    )
    assert chosen.former_base == "train-lla-00000000000b-e68733-0"
    assert chosen.ref(1).name == "train-llama-70b-finetune-eloqedkk"
    assert chosen.ref(1).marker == f"prefect:flow_run/{flow}/keep/e68733-0/1"
    assert worker_marker_prefix(UUID(flow)) == f"prefect:worker/{flow}/"
    machine = machine_names(
        UUID(flow), {"prefect.io/flow-name": "Nightly", "prefect.io/deployment-name": "prod"}
    )
    assert machine.ref(2) == RunRef("nightly-prod-gmxkwaus-2", f"prefect:worker/{flow}/2", generated=True)
    assert machine_names(UUID(flow), {}).ref(1).name == "run-gmxkwaus"
    assert former_machine_name(UUID(flow), 2) == "pf-00000000000b-w2"


def test_only_another_execution_of_a_flow_run_looks_for_runs_of_an_earlier_version() -> None:
    assert named(owner(flow="f", count=1), Ordinals()).former_base is None
    assert named(owner(flow="f", count=2), Ordinals()).former_base is not None
    # A run whose name was random is not found again.
    assert named(owner(flow="f", count=2, shares=False), Ordinals()).former_base is None
    assert named(owner(flow=None, count=2), Ordinals()).former_base is None


def test_a_name_is_the_flows_and_the_tasks() -> None:
    who = replace(owner(flow="f"), flow_name="Nightly train", task_name="fit")
    assert re.fullmatch(r"nightly-train-fit-[a-z0-9]{8}", named(who, Ordinals()).ref(1).name)
    called = named(who, Ordinals(), prefix="llama").ref(1).name
    assert re.fullmatch(r"nightly-train-llama-[a-z0-9]{8}", called)


def test_a_task_of_this_package_has_a_name_only_if_the_user_gave_it_one() -> None:
    assert name_of_task(run_task) is None
    assert name_of_task(run_task.with_options(name="fit")) == "fit"


@pytest.mark.parametrize("marker", [None, "", "prefect:", "prefect:a/b", "prefect:a/b/", "airflow:a/b/c"])
def test_another_owners_marker_is_not_read(marker: str | None) -> None:
    assert owner_of(marker) is None
    assert owner_of("prefect:worker/7/1") == ("worker", "7")


def test_another_execution_of_the_flow_run_finds_the_same_names() -> None:
    flow = str(uuid4())
    first, second = Ordinals(), Ordinals()
    before = {named(owner(flow=flow), first).ref(1) for _ in range(3)}
    after = {named(owner(flow=flow), second).ref(1) for _ in range(3)}
    assert before == after
    assert len(before) == 3


def test_a_retry_of_the_flow_in_the_same_process_finds_the_same_names() -> None:
    ordinals, flow = Ordinals(), str(uuid4())
    before = [named(owner(flow=flow, count=1), ordinals).ref(1) for _ in range(2)]
    after = [named(owner(flow=flow, count=2), ordinals).ref(1) for _ in range(2)]
    assert before == after


def test_a_retried_task_keeps_its_name() -> None:
    ordinals = Ordinals()
    assert named(owner("task", "flow"), ordinals) == named(owner("task", "flow"), ordinals)


def test_flow_runs_created_in_the_same_minute_have_different_names() -> None:
    early, late = "019b1234-aaaa-7000-8000-00000000000a", "019b1234-aaaa-7000-8000-00000000000b"
    assert named(owner(flow=early), Ordinals()).base != named(owner(flow=late), Ordinals()).base


def test_tasks_of_other_processes_never_share_a_run() -> None:
    flow = str(uuid4())
    first = named(owner(flow=flow, shares=False), Ordinals())
    second = named(owner(flow=flow, shares=False), Ordinals())
    assert first.base != second.base
    assert first.stem != second.stem


def test_every_part_of_a_specification_changes_the_name() -> None:
    who = owner("task", "flow")
    bases = {
        identify(who, spec, on_crash=on_crash, ordinals=Ordinals()).base
        for spec in (SPEC, {**SPEC, "max_duration": "2h"})
        for on_crash in ("stop", "keep")
    }
    assert len(bases) == 4


def test_a_callers_name_is_used_as_it_is_in_every_attempt() -> None:
    identity = named(owner(flow="flow"), Ordinals(), run_name="train")
    assert [identity.ref(number).name for number in (1, 2)] == ["train", "train"]
    assert identity.ref(1).marker != identity.ref(2).marker


def test_markers_contain_the_attempt_and_the_owner() -> None:
    identity = named(owner(flow="flow"), Ordinals())
    assert identity.number_of(identity.ref(7).marker) == 7
    assert identity.ref(1).marker.startswith(flow_run_marker_prefix("flow"))
    other = named(owner(flow="other"), Ordinals())
    for marker in (None, "", "x", other.ref(1).marker, identity.stem, identity.stem + "/x"):
        assert identity.number_of(marker) is None


def test_markers_contain_what_happens_after_a_crash() -> None:
    for on_crash in ("stop", "keep"):
        identity = identify(owner(), SPEC, on_crash=on_crash, ordinals=Ordinals())
        assert outlives_crash(identity.ref(1).marker) is (on_crash == "keep")


def test_a_task_outside_a_flow_has_a_name_of_its_own() -> None:
    first = named(owner(str(uuid4()), None), Ordinals())
    second = named(owner(str(uuid4()), None), Ordinals())
    assert first.base != second.base
    assert first.stem.startswith("prefect:task_run/")
