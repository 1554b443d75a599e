"""A page of active runs is divided into the texts of its runs, and each is read only where it is news."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._shared.batched_polls import PAGE_WORTH
from dstack_core._wire.http_messages import Reply
from dstack_core._wire.lookups import PAGE_SIZE, Lookup, Sighting, active_page
from dstack_core._wire.runs import RunSnapshot, parse_run
from dstack_core.errors import ProtocolError
from tests.core.scripted import recorded, run_json
from tests.core.test_shared import Server, batched, run
from tests.core.test_shared_waits import ended, polls_of, wait

LOOKS_LIKE_A_RUN = ', {"id": "id-1", "project_name": "main"}'


def sightings(text: str) -> list[Sighting]:
    page = active_page("http://server", "main", None)
    return list(page.parse(Reply(200, {}, text.encode())))


def fingerprint(changes: dict[str, Any]) -> int:
    (only,) = sightings(json.dumps([run_json("running") | changes]))
    return only.fingerprint


@given(
    st.lists(st.text(max_size=20) | st.just(LOOKS_LIKE_A_RUN), max_size=4),
    st.sampled_from([None, (",", ":")]),
    st.sampled_from([None, 2]),
)
def test_each_run_of_a_page_has_its_own_text(
    values: list[str], separators: tuple[str, str] | None, indent: int | None
) -> None:
    runs = [
        run_json(name=f"run-{number}", run_id=f"id-{number}") | {"status_message": value, "error": value}
        for number, value in enumerate(values)
    ]
    found = sightings(json.dumps(runs, separators=separators, indent=indent))
    assert [json.loads(one.written) for one in found] == runs
    assert [one.by_id for one in found] == [Lookup("main", "id", item["id"]) for item in runs]
    assert [one.by_name.value for one in found] == [item["run_spec"]["run_name"] for item in runs]


@pytest.mark.parametrize("version", ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"])
def test_recorded_runs_of_every_server_are_divided(version: str) -> None:
    run_of_version = recorded(f"runs_get_done_e2e_{version}")
    runs = [run_of_version, run_of_version, *recorded(f"runs_list_{version}")]
    assert [json.loads(one.written) for one in sightings(json.dumps(runs))] == runs


@pytest.mark.parametrize("text", ["[]", " [ ] ", "[\n]"])
def test_a_page_may_be_empty(text: str) -> None:
    assert sightings(text) == []


@pytest.mark.parametrize(
    "text",
    ["", "{}", "null", "[1]", '[{"id": 1}]', '["id"]', '[{"project_name": "main", "id": "x"}]', "[{}, {}]"],
)
def test_any_other_reply_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="expected a reply of dstack to /api/runs/list"):
        sightings(text)


def test_a_page_that_is_cut_short_is_refused() -> None:
    text = json.dumps([run_json("running"), run_json("running", run_id="id-2")])
    for end in range(len(text)):
        with pytest.raises(ProtocolError):
            [one.by_name for one in sightings(text[:end])]


def test_a_full_page_has_a_position_behind_it() -> None:
    runs = [run_json(run_id=f"id-{number}") for number in range(PAGE_SIZE)]
    page = active_page("http://server", "main", None).parse(Reply(200, {}, json.dumps(runs).encode()))
    assert page.position is None
    assert len(list(page)) == PAGE_SIZE
    assert page.position == {"prev_submitted_at": runs[-1]["submitted_at"], "prev_run_id": runs[-1]["id"]}


@pytest.mark.parametrize(
    "changes",
    [{"cost": 0.25}, {"last_processed_at": "2027-01-01T00:00:00Z"}],
    ids=lambda one: next(iter(one)),
)
def test_what_changes_at_every_poll_is_not_in_the_fingerprint(changes: dict[str, Any]) -> None:
    before = {"cost": 0.0, "last_processed_at": "2026-11-23T09:00:00Z"}
    assert fingerprint(before | changes) == fingerprint(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "terminating"},
        {"status_message": "retrying"},
        {"termination_reason": "stopped_by_user"},
        {"deleted": True},
        {"jobs": []},
        {"error": "x"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_what_is_news_is_in_the_fingerprint(changes: dict[str, Any]) -> None:
    assert fingerprint(changes) != fingerprint({})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the ids of the runs that are read."""
    ids: list[str] = []

    def parse(item: Any) -> RunSnapshot:
        ids.append(item["id"])
        return parse_run(item)

    monkeypatch.setattr("dstack_core._wire.lookups.parse_run", parse)
    return ids


def test_a_run_without_news_is_read_once_and_one_without_watchers_never(read: list[str]) -> None:
    async def steps() -> None:
        server = Server(50)
        one = batched(server)
        all_asked = [wait(one, index, 4) for index in range(20)]
        answers = await ended(all_asked)
        # A machine that pauses in between splits a round in two. The smaller part may be too few for a page:
        # those few get None and are polled alone.
        shared = [asked for asked, answer in zip(all_asked, answers, strict=True) if answer == "running"]
        assert {answer for answer in answers if answer != "running"} <= {None}
        assert len(shared) > 20 - PAGE_WORTH
        assert {polls_of(asked) for asked in shared} == {4}

    run(steps)
    assert sorted(read) == sorted(f"id-{index}" for index in range(20))


def test_a_change_is_read_again(read: list[str]) -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        all_asked = [wait(one, index, 1000) for index in range(5)]
        await server.asked.wait()
        server.runs = [item | {"status": "done"} for item in server.runs]
        assert await ended(all_asked) == ["done"] * 5

    run(steps)
    assert set(read) == {f"id-{index}" for index in range(5)}


def test_an_unchanged_run_ends_a_wait_that_asks_for_it() -> None:
    """So ends the wait for a run whose accepted stop the server has dropped."""

    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        all_asked = [wait(one, index, 1000) for index in range(5)]
        while not all(asked.seen is not None for asked in all_asked):
            await server.asked.wait()
            await asyncio.sleep(0)
        assert all_asked[3].wait is not None
        all_asked[3].wait.is_news.when_unchanged = lambda run_id: run_id == "id-3"  # type: ignore[method-assign]
        assert await ended(all_asked[3:4]) == ["running"]
        one.close()

    run(steps)
