"""What a run waits for before it starts: texts from recorded replies, and how often they are reported."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from dstack_core import Progress, Waiting
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core._wire.waits import waits_for
from dstack_core.integration import LogRelay
from dstack_core.models.outcome import Outcome
from tests.core.scripted import LOST, Driver, Script, page, recorded, recorded_reply, reply, run_json

API = Api("http://server", "main")
MACHINE = {"backend": "aws", "region": "eu-west-1", "price": 2.5, "instance_type": {"name": "p5.4xlarge"}}


def text_of(run: dict[str, Any]) -> str:
    waits = waits_for(run)
    assert waits is not None
    return waits.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs_get_no_fleet_0.18.44", "capacity: cpu 2.., memory 8GB.., on-demand"),
        ("runs_get_submitted_0.22.5", "capacity: cpu 2.., memory 8GB.., on-demand; fleets rig"),
        (
            "runs_get_retry_no_capacity_0.22.5",
            "capacity: gpu H100:1, cpu 2.., memory 8GB.., on-demand; 2 attempts so far, the last one: No offers "
            "matching the run requirements in fleet 'rig'. See "
            "https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails",
        ),
        ("runs_get_provisioning_0.18.44", "machine instance in remote"),
        ("runs_get_pulling_0.22.5", "image dstackai/base:0.16-base-ubuntu24.04, on instance in remote"),
        ("runs_get_restarting_0.22.5", "its next attempt; 1 attempt so far, the last one: exited (1)"),
        ("runs_get_scheduled_0.22.5", "its schedule; next start at "),
    ],
)
def test_what_recorded_runs_wait_for(name: str, expected: str) -> None:
    text = text_of(recorded(name))
    assert text.startswith(expected) if expected.endswith(" ") else text == expected


def test_the_text_names_prices_places_and_the_progress_of_a_pull() -> None:
    run = copy.deepcopy(recorded("runs_get_pulling_0.22.5"))
    last = run["jobs"][0]["job_submissions"][-1]
    last["job_provisioning_data"] |= MACHINE
    last["image_pull_progress"] = {
        "downloaded_bytes": 1_200_000_000,
        "extracted_bytes": 800_000_000,
        "total_bytes": 5_600_000_000,
        "is_total_bytes_final": False,
    }
    assert text_of(run) == (
        "image dstackai/base:0.16-base-ubuntu24.04: 1.2 of at least 5.6 GB downloaded, 0.8 GB extracted, on "
        "p5.4xlarge in aws eu-west-1, 2.50 USD per hour"
    )
    last |= {"status": "submitted", "status_message": "submitted"}
    needs = run["jobs"][0]["job_spec"]["requirements"]
    needs |= {"spot": None, "max_price": 3.0}
    needs["resources"]["gpu"] = {
        "name": ["A100", "H100"],
        "memory": {"min": 40, "max": None},
        "count": {"min": 2},
    }
    run["run_spec"]["profile"] = {"backends": ["aws", "gcp"], "regions": None}
    run["run_spec"]["configuration"] |= {"backends": ["azure"], "fleets": None}
    assert text_of(run) == (
        "capacity: gpu A100,H100:40GB..:2.., cpu 2.., memory 8GB.., spot or on-demand, at most 3.00 USD per hour; "
        "backends aws, gcp"
    )


def test_of_several_jobs_the_one_that_is_furthest_behind_counts() -> None:
    run = copy.deepcopy(recorded("runs_get_pulling_0.22.5"))
    second = copy.deepcopy(run["jobs"][0])
    second["job_submissions"][-1] |= {"status": "submitted", "id": "other", "job_provisioning_data": None}
    run["jobs"].append(second)
    assert text_of(run).startswith("capacity: ")
    assert text_of(run).endswith(" (job 2 of 2)")


@pytest.mark.parametrize("broken", [{"jobs": 3}, {"jobs": [{"job_submissions": [{}]}]}, {"jobs": []}, {}])
def test_what_cannot_be_read_is_left_out(broken: dict[str, Any]) -> None:
    assert waits_for(broken) is None


def flow(driver: Driver, interval: float | None = 60.0, longest: float = 15.0) -> Flow[Outcome]:
    progress = Progress("train", "id-1")
    options = FollowOptions(5, True, driver.clock, longest, waiting_interval=interval)
    return retrying(follow(API, progress, options), RetryBudget(600, driver.clock), progress)


def waiting(status: str = "submitted", polls: int = 40) -> list[Any]:
    return [reply(run_json(status))] * polls


EVENTS = [
    {"id": "2", "message": "Instance created for job. Instance status: PENDING", "recorded_at": "2026-11-23T10:17:00Z",
     "targets": [{"type": "job", "id": "sub-0"}, {"type": "instance", "id": "i", "name": "fleet-0"}]},
    {"id": "1", "message": "Job status changed SUBMITTED -> PROVISIONING", "recorded_at": "2026-11-23T10:16:30Z",
     "targets": [{"type": "job", "id": "sub-0"}]},
    {"id": "0", "message": "Job status changed SUBMITTED -> PROVISIONING", "recorded_at": "2026-11-23T10:19:30Z",
     "targets": [{"type": "job", "id": "another"}]},
]  # fmt: skip


def test_a_waiting_run_reports_once_a_minute_what_it_waits_for(driver: Driver) -> None:
    script = Script(
        runs__get=[*waiting(), reply(run_json("done"))], events__list=[reply([])], logs__poll=[page()]
    )
    events = [event for event in driver.events(flow(driver), script) if isinstance(event, Waiting)]
    assert [event.text[:9] for event in events] == ["capacity:"] * 3
    assert all(event.since == datetime(2026, 11, 23, 10, 16, 0, 666127, UTC) for event in events)
    # One request for the events with each report, and no other.
    assert script.paths().count("events/list") == 3
    assert script.bodies("events/list")[0] == {"within_runs": ["id-1"], "limit": 20}


def test_no_report_comes_in_the_first_minute_nor_when_they_are_not_wanted(driver: Driver) -> None:
    for interval, polls in ((60.0, 11), (None, 100)):
        script = Script(runs__get=[*waiting(polls=polls), reply(run_json("done"))], logs__poll=[page()])
        assert not [one for one in driver.events(flow(driver, interval), script) if isinstance(one, Waiting)]


def test_events_add_since_when_and_what_happened_last(driver: Driver) -> None:
    script = Script(
        runs__get=[*waiting("provisioning", 14), reply(run_json("done"))],
        events__list=[reply(EVENTS)],
        logs__poll=[page()],
    )
    (event,) = [event for event in driver.events(flow(driver), script) if isinstance(event, Waiting)]
    assert event.since == datetime(2026, 11, 23, 10, 16, 30, tzinfo=UTC)
    assert event.text.endswith(
        ". Last event at 10:17:00 UTC: Instance created for job. Instance status: PENDING (fleet-0)"
    )


def test_without_events_the_time_is_when_the_step_was_first_seen(driver: Driver) -> None:
    start = driver.clock.now
    # What servers before 0.20 answer, an error of the server, and no answer.
    for answer in (recorded_reply("events_list_0.19.40"), reply({}, 500), LOST):
        driver.clock.now = start
        script = Script(
            runs__get=[*waiting(polls=2), *waiting("provisioning", 30), reply(run_json("done"))],
            events__list=[answer],
            logs__poll=[page()],
        )
        events = driver.events(flow(driver), script)
        reports = [event for event in events if isinstance(event, Waiting)]
        assert {event.since for event in reports} == {datetime.fromtimestamp(start + 10, UTC)}
        assert len(reports) == 2
        # A refusal is final; what may pass is asked for with the next report, not again at once.
        expected = 1 if getattr(answer, "status", 500) == 405 else 2
        assert script.paths().count("events/list") == expected
        assert not [event for event in events if type(event).__name__ == "ContactLost"]


def test_where_many_are_followed_events_are_asked_for_once_a_step(driver: Driver) -> None:
    script = Script(
        runs__get=[*waiting(polls=60), *waiting("provisioning", 60), reply(run_json("done"))],
        events__list=[reply([])],
        logs__poll=[page()],
    )
    reports = [one for one in driver.events(flow(driver, longest=60.0), script) if isinstance(one, Waiting)]
    assert len(reports) > 6
    assert script.paths().count("events/list") == 2


def test_a_relay_logs_what_a_run_waits_for_without_secrets() -> None:
    event = Waiting(Progress("train"), "image r/hunter22:1\n[31m", datetime.now(UTC))
    ((_, text),) = LogRelay(secrets=["hunter22"]).records(event)
    assert text == "Run train waits for image r/***:1 [31m (0 s so far)"


def without_capacity(number: int) -> dict[str, Any]:
    """Return an attempt that got no machine, of the minute ``number``."""
    return {
        "id": f"sub-{number}",
        "status": "failed",
        "termination_reason": "failed_to_start_due_to_no_capacity",
        "submitted_at": f"2026-11-23T10:0{number}:00+00:00",
        "finished_at": f"2026-11-23T10:0{number}:20+00:00",
    }


def test_the_wait_for_capacity_began_with_the_first_attempt_also_between_two() -> None:
    started = {"id": "s", "status": "failed", "termination_reason": "container_exited_with_error"}
    started |= {"submitted_at": "2026-11-23T09:00:00+00:00", "finished_at": "2026-11-23T09:30:00+00:00"}
    open_attempt = {"id": "o", "status": "submitted", "submitted_at": "2026-11-23T10:05:00+00:00"}
    first, second = without_capacity(1), without_capacity(2)
    for attempts, since in (
        ([first], "10:01:00"),
        ([first, open_attempt], "10:01:00"),
        ([first, second], "10:01:00"),
        ([started, first, second, open_attempt], "10:01:00"),
        ([first, started, second], "10:02:00"),
        ([started, open_attempt], "10:05:00"),
        ([first, started], "09:30:00"),
        ([first, {**open_attempt, "status": "provisioning"}], "None"),
        ([{**started, "finished_at": None}], "None"),
    ):
        waits = waits_for({"jobs": [{"job_spec": {}, "job_submissions": attempts}]})
        assert waits is not None
        assert (f"{waits.since:%H:%M:%S}" if waits.since else "None") == since, attempts


def test_the_logs_of_attempts_that_got_no_machine_are_not_read(driver: Driver) -> None:
    retried = recorded("runs_get_retry_no_capacity_0.22.5")
    ended = copy.deepcopy(retried) | {"status": "failed"}
    script = Script(
        runs__get=[*[reply(retried)] * 3, reply(ended)], logs__poll=[page()], events__list=[reply([])]
    )
    progress = Progress(retried["run_spec"]["run_name"], retried["id"])
    options = FollowOptions(5, True, driver.clock)
    assert driver.run(follow(API, progress, options), script).status == "failed"
    assert set(script.paths()) == {"runs/get"}
