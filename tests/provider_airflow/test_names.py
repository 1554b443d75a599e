"""Names and markers of runs: one for every try, and known to the next."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack._names import TaskNames, run_ref
from dstack_core import Task
from dstack_core.integration import RunRef
from dstack_core.local import LocalServer

STARTED = datetime(2026, 11, 23, 12, 0, 0, 123456, UTC)


def names(
    chosen: str | None = None, retries: int = 2, started: datetime = STARTED, **change: Any
) -> TaskNames:
    values = {"dag_id": "d", "run_id": "r", "task_id": "t", "try_number": 1, "max_tries": 2, "map_index": -1}
    context: Any = {
        "ti": SimpleNamespace(**{**values, **change}),
        "dag_run": SimpleNamespace(start_date=started),
    }
    return TaskNames.of(context, chosen, retries)


def test_every_try_has_a_name_and_a_marker_of_its_own() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"dag_id": "e"},
        {"run_id": "s"},
        {"task_id": "u"},
        {"try_number": 2},
        {"map_index": 0},
        {"map_index": 1},
        {"started": STARTED.replace(microsecond=1)},
    ]
    runs = [names(**change).run for change in changes]
    assert len({run.name for run in runs}) == len({run.marker for run in runs}) == len(changes)
    assert names().run == names().run
    assert re.fullmatch(r"d-t-[a-z0-9]{8}", names().run.name)


def test_a_marker_reads_like_what_it_means() -> None:
    born = names().born
    assert names().run.marker == f"airflow:d/r/t/1of3#{born}"
    assert names(map_index=3, try_number=2).run.marker == f"airflow:d/r/t[3]/2of3#{born}"


def test_names_and_markers_stay_as_they_are_for_runs_of_an_earlier_version() -> None:
    context: Any = {
        "ti": SimpleNamespace(
            dag_id="etl",
            run_id="scheduled__2026-11-23T12:00:00+00:00/x",
            task_id="train",
            try_number=2,
            max_tries=3,
            map_index=-1,
        ),
        "dag_run": SimpleNamespace(start_date=STARTED),
    }
    marker = "airflow:etl/scheduled__2026-11-23T12:00:00+00:00/x/train/2of4#4390c1"
    found = TaskNames.of(context, None, 3)
    assert found.run == RunRef("etl-train-wrxi5j80", marker, generated=True)
    assert found.former_run == RunRef("af-7a0888013552", marker, generated=True)
    context["ti"].map_index = 3
    kept = TaskNames.of(context, "train", 3, keep=True).run
    assert kept == RunRef("train-3", f"{marker.replace('/2of4', '[3]/2of4')}/keep")


def test_a_name_is_the_dags_and_the_tasks_and_the_index() -> None:
    run = names(dag_id="Train.nightly", task_id="gpu.fit", run_id="a/b[7]/c", map_index=12).run
    assert re.fullmatch(r"train-nightly-gpu-fit-12-[a-z0-9]{8}", run.name)
    assert run.generated
    long = names(dag_id="d" * 250, task_id="t" * 250, map_index=3).run
    assert re.fullmatch(r"d{14}-t{15}-3-[a-z0-9]{8}", long.name)


def test_a_name_that_another_try_generated_is_not_this_ones() -> None:
    second = names(try_number=2).run
    assert run_ref(second.name, second.marker).generated
    assert not run_ref(names().run.name, second.marker).generated
    assert not run_ref(second.name, "theirs").generated


def test_the_name_does_not_change_when_airflow_draws_a_new_id_for_the_try() -> None:
    assert names(id="1").run == names(id="2").run


def test_a_later_try_knows_the_runs_of_the_earlier_ones() -> None:
    first, third = names(), names(try_number=3)
    assert list(third.earlier_tries) == [2, 1]
    assert third.name_in(1) == first.run.name
    assert third.read_marker(first.run.marker) == (1, 2)


@pytest.mark.parametrize(
    ("try_number", "max_tries", "earlier"),
    [
        (1, 2, []),
        (2, 2, [1]),
        (3, 2, [2, 1]),
        (4, 5, [3]),
        (5, 5, [4]),
        (6, 5, [5, 4]),
        (1, 0, []),
        (2, 1, [1]),
    ],
    ids=["first", "retry", "last", "cleared", "retry-after-clear", "last-after-clear", "no-retries", "again"],
)
def test_only_the_last_try_before_a_clear_still_matters(
    try_number: int, max_tries: int, earlier: list[int]
) -> None:
    found = names(try_number=try_number, max_tries=max_tries, retries=0 if max_tries < 2 else 2)
    assert list(found.earlier_tries) == earlier
    assert found.is_retry is (try_number in (2, 3, 5, 6) and max_tries > 1)


@pytest.mark.parametrize(
    "marker",
    ["", "theirs", "airflow:d/r/t/1of3#000000", "airflow:d/r/t[1]/1of3#{born}", "airflow:d/r/t/xof3#{born}"],
)
def test_another_owners_marker_is_not_read(marker: str) -> None:
    assert names().read_marker(marker.format(born=names().born)) is None


def test_mapped_tasks_share_no_chosen_name() -> None:
    chosen = [names("train", map_index=index).run.name for index in range(3)]
    assert chosen == ["train-0", "train-1", "train-2"]
    assert names("train").run.name == "train"
    assert names("train-1", map_index=1).run.name == "train-1"


def test_a_server_takes_these_names(server: LocalServer) -> None:
    run = names(map_index=11).run
    found = server.client().runs.submit(Task(commands=["true"]), run_name=run.name, marker=run.marker)
    assert (found.name, found.marker) == (run.name, run.marker)
