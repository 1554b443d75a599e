"""The names and markers that every engine builds its own from."""

from __future__ import annotations

import pytest

from dstack_core._wire.spec import check_run_name
from dstack_core.integration import (
    AttemptNames,
    RunRef,
    make_marker,
    read_marker,
    run_name,
    short_hash,
    slug,
)
from dstack_core.integration.names import LONGEST_NAME


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", "train"),
        ("Train_LLaMA-70b  finetune", "train-llama-70b-finetune"),
        ("--a--", "a"),
        ("7b-model", "job"),
        ("ü", "job"),
        ("", "job"),
        (None, "job"),
        ("a" * 60, "a" * LONGEST_NAME),
    ],
)
def test_any_text_becomes_a_part_of_a_name(text: str | None, expected: str) -> None:
    assert slug(text, default="job") == expected


def test_a_part_of_a_name_can_be_shortened_and_does_not_end_in_a_hyphen() -> None:
    assert slug("train llama", default="job", longest=6) == "train"


def test_a_hash_is_the_same_in_every_process_and_version() -> None:
    assert short_hash("etl/train/1") == "a8daedf7e256"
    assert short_hash("etl/train/1", 6) == "a8daed"
    assert short_hash("ü") != short_hash("u")


def test_a_marker_is_read_as_it_was_made() -> None:
    marker = make_marker("engine", "flow", "7", "2")
    assert marker == "engine:flow/7/2"
    assert read_marker(marker, "engine") == ("flow", "7", "2")


@pytest.mark.parametrize(
    "marker", [None, "", "theirs", "engine2:flow/7", "dstack-core:1234", "/home/me/task.yml"]
)
def test_a_marker_of_another_owner_has_no_parts(marker: str | None) -> None:
    assert read_marker(marker, "engine") == ()


def test_the_markers_of_a_jobs_attempts_differ_only_in_their_number() -> None:
    names = AttemptNames(f"{slug('Train', default='job')}-{short_hash('x', 6)}", make_marker("engine", "7"))
    assert names.ref(2) == RunRef("train-2d7116-2", "engine:7/2", generated=True)
    assert names.number_of("engine:7/2") == 2


@pytest.mark.parametrize(
    ("parts", "suffix", "readable"),
    [
        (["etl", "train"], "", "etl-train"),
        (["etl", "train"], "3", "etl-train-3"),
        (["Train_Nightly", "group.Train"], "", "train-nightly-group-train"),
        (["Ünïcode", "Straße", "Łódź"], "", "unicode-strasse-lodz"),
        (["训练", "train"], "", "train"),
        (["训练", None], "", "run"),
        ([], "7", "run-7"),
        (["7b", "--"], "", "run-7b"),
        (["a" * 60, "b" * 60], "", f"{'a' * 15}-{'b' * 16}"),
        (["a" * 60, "b"], "", f"{'a' * 30}-b"),
        (["ab", "c" * 60], "12345", f"ab-{'c' * 23}-12345"),
        (["a" * 14 + "_x", "b" * 60], "", f"{'a' * 14}-{'b' * 16}"),
    ],
)
def test_a_name_is_what_a_job_is_called_and_a_hash(parts: list[str], suffix: str, readable: str) -> None:
    name = run_name(parts, "one", suffix=suffix)
    assert name == f"{readable}-kfx9iid0"
    assert check_run_name(name) == name == run_name(parts, "one", suffix=suffix)
    assert run_name(parts, "another", suffix=suffix) not in (name, "")


def test_a_name_leaves_room_for_what_follows_it() -> None:
    for count in range(1, 8):
        assert len(run_name(["x" * 50] * count, "one", longest=37)) <= 37


def test_a_run_that_an_earlier_version_named_is_one_of_the_job() -> None:
    names = AttemptNames("etl-train-1", "engine:7", former_base="job-7")
    assert names.former_ref(2) == RunRef("job-7-2", "engine:7/2", generated=True)
    assert names.ref_of(2, "job-7-2") == names.former_ref(2)
    assert names.ref_of(2, "etl-train-1-2") == names.ref(2)
    assert AttemptNames("etl-train-1", "engine:7").former_ref(1) is None
    assert AttemptNames("etl-train-1", "engine:7", "chosen", "job-7").former_ref(1) is None
