"""Every engine shows a run with the same words, numbers and fields."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from dstack_core import NoCapacityError, Outcome, RunFailedError, RunStatus, RunStoppedError, RunUserError
from dstack_core._wire.runs import outcome_of, parse_run
from dstack_core.integration import (
    OUTCOME_FIELDS,
    StopResult,
    StopState,
    describe_end,
    describe_failure,
    describe_outcome,
    describe_status,
    describe_stop,
    format_duration,
    format_price,
    format_usd,
    outcome_dict,
    outcome_rows,
    outcome_table,
    raise_for_outcome,
)
from tests.core.scripted import DATA

FAILED = Outcome(
    run_name="train",
    run_id="id-1",
    project="main",
    status=RunStatus.FAILED,
    exit_status=7,
    reason="container_exited_with_error",
    message="failed: its command exited with status 7",
    cost=0.5,
    duration=3725.4,
    instance="g5.xlarge",
    backend="aws",
    region="us-east-1",
    price_per_hour=1.2,
    url="http://server/runs/id-1",
)
DONE = replace(FAILED, status=RunStatus.DONE, exit_status=0, reason="all_jobs_done", message="finished")
NO_CAPACITY = replace(
    FAILED,
    category="",
    cause="",
    next_step="",
    reason="failed_to_start_due_to_no_capacity",
    message="failed: no capacity, no machine could be had",
    exit_status=None,
    instance=None,
    backend=None,
    region=None,
    price_per_hour=None,
    cost=0.0,
    duration=4.0,
)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0.00 USD"),
        (0.5, "0.50 USD"),
        (0.0012, "0.0012 USD"),
        (0.98765, "0.9877 USD"),
        (0.99999, "1.00 USD"),
        (1, "1.00 USD"),
        (1.006, "1.01 USD"),
        (12.34567, "12.35 USD"),
        (1e4, "10000.00 USD"),
    ],
)
def test_money_has_two_decimals_from_one_dollar_on_and_up_to_four_below(amount: float, text: str) -> None:
    assert format_usd(amount) == text
    assert format_price(amount) == f"{text} per hour"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (42.4, "42 s"),
        (60, "1 min"),
        (61.4, "1 min 1 s"),
        (3605, "1 h 5 s"),
        (3725.4, "1 h 2 min 5 s"),
        (180000, "50 h"),
    ],
)
def test_a_duration_has_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_fields_are_those_of_an_outcome() -> None:
    assert [(field.name, field.type) for field in OUTCOME_FIELDS] == [
        (field.name, field.type) for field in fields(Outcome)
    ]
    assert len({field.label for field in OUTCOME_FIELDS}) == len(OUTCOME_FIELDS)
    assert all(field.meaning for field in OUTCOME_FIELDS)


def test_every_field_of_an_outcome_is_read_from_a_reply_of_a_real_server() -> None:
    bodies = [json.loads(path.read_text())["response"]["json"] for path in DATA.glob("runs_get_*.json")]
    outcomes = [outcome_of(parse_run(body), "http://server/run") for body in bodies]
    known = {
        field.name for field in OUTCOME_FIELDS for one in outcomes if getattr(one, field.name) is not None
    }
    # A result is in the log, a utilization in a reply of its own.
    assert known == {field.name for field in OUTCOME_FIELDS} - {"result", "utilization"}


def test_an_outcome_of_the_first_version_is_read() -> None:
    """Give fields that are added later None or a default: outcomes of an older version lack them."""
    first = ("run_name", "run_id", "project", "status", "message", "cost", "url")
    outcome = Outcome.from_dict({name: value for name, value in FAILED.to_dict().items() if name in first})
    assert (outcome.run_name, outcome.cost, outcome.duration) == ("train", 0.5, None)


def test_data_of_an_outcome_has_every_field_and_can_be_read_back() -> None:
    data = json.loads(json.dumps(outcome_dict(FAILED)))
    assert list(data) == [field.name for field in OUTCOME_FIELDS]
    assert Outcome.from_dict(data) == FAILED


def test_what_an_engine_keeps_is_small_whatever_the_server_sends() -> None:
    texts = (field.name for field in OUTCOME_FIELDS if field.type in ("str", "str | None"))
    huge = Outcome.from_dict({**FAILED.to_dict(), **dict.fromkeys(texts, "m" * 1_000_000)})
    assert len(json.dumps(outcome_dict(huge))) < 25_000
    assert outcome_dict(huge)["message"].endswith("m [...]")
    assert len(describe_outcome(huge)) < 20_000
    assert len(outcome_table(replace(FAILED, message="m" * 1_000_000))) < 20_000
    wordy = replace(FAILED, message="m" * 1_000_000)
    with pytest.raises(RunFailedError) as caught:
        raise_for_outcome(wordy, ["l" * 10_000] * 100)
    assert len(str(caught.value)) < 15_000
    assert len(caught.value.outcome.message) < 3_000


def test_a_table_has_a_row_for_every_field_that_is_known() -> None:
    assert outcome_rows(FAILED) == {
        "Run": "train",
        "Run ID": "id-1",
        "Project": "main",
        "Status": "failed",
        "Exit status": "7",
        "Reason": "container_exited_with_error",
        "Message": "failed: its command exited with status 7",
        "Cost": "0.50 USD",
        "Duration": "1 h 2 min 5 s",
        "Instance": "g5.xlarge",
        "Backend": "aws",
        "Region": "us-east-1",
        "Price": "1.20 USD per hour",
        "Page": "http://server/runs/id-1",
        "Category": "user.exit",
        "Cause": "The command of the run failed.",
        "Next step": "Correct the command or its input; the end of the log shows what went wrong.",
    }
    # The answer to "why" comes before the details.
    assert list(outcome_rows(FAILED))[6:11] == ["Message", "Category", "Cause", "Next step", "Cost"]
    assert {"Exit status", "Instance", "Backend", "Region", "Price"}.isdisjoint(outcome_rows(NO_CAPACITY))
    assert outcome_rows(replace(FAILED, exit_status=0, duration=0.0))["Exit status"] == "0"


def test_a_hold_that_has_not_ended_has_upper_limits_in_the_table() -> None:
    held = replace(FAILED, debug_seconds=1800.0, debug_cost=0.6)
    assert (outcome_rows(held)["Held"], outcome_rows(held)["Cost of the hold"]) == ("30 min", "0.60 USD")
    rows = outcome_rows(replace(held, debug_command="python -m dstack_core attach train"))
    assert (rows["Held"], rows["Cost of the hold"]) == ("at most 30 min", "at most 0.60 USD")
    assert "Cost of the hold" not in outcome_rows(replace(held, debug_command="x", debug_cost=0.0))


def test_a_servers_message_does_not_break_a_markdown_table() -> None:
    text = outcome_table(replace(FAILED, message="exited | with\nstatus 7"))
    assert "| Message | exited \\| with status 7 |" in text
    assert "| Cost | 0.50 USD |" in text
    header, _, *rows = text.splitlines()
    assert header == "| Run | [train](http://server/runs/id-1) |"
    assert {"Run", "Page", *(row.split(" |")[0][2:] for row in rows)} == set(outcome_rows(FAILED))
    assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines())


def test_the_last_line_of_a_log_sums_up_the_run() -> None:
    assert describe_outcome(DONE) == (
        "Run train finished, 1 h 2 min 5 s on g5.xlarge (aws, us-east-1), 0.50 USD"
    )
    assert describe_outcome(replace(DONE, region=None, backend=None)) == (
        "Run train finished, 1 h 2 min 5 s on g5.xlarge, 0.50 USD"
    )
    assert describe_outcome(NO_CAPACITY) == (
        "Run train failed: no capacity, no machine could be had, 4 s, 0.00 USD"
    )
    assert describe_outcome(replace(NO_CAPACITY, duration=None)).endswith("could be had, 0.00 USD")
    searched = replace(NO_CAPACITY, message=f"{NO_CAPACITY.message} (No offers). disk: 16GB is exact")
    assert describe_outcome(searched) == describe_outcome(NO_CAPACITY)
    assert describe_end(searched).endswith("could be had (No offers). disk: 16GB is exact.")


def test_a_failure_shows_what_happened_where_to_look_and_the_last_lines() -> None:
    assert describe_failure(FAILED) == (
        "Run train failed: its command exited with status 7. See http://server/runs/id-1 \n"
        "Correct the command or its input; the end of the log shows what went wrong (user.exit)."
    )
    assert describe_failure(FAILED, ["epoch 1", "out of memory"]) == (
        "Run train failed: its command exited with status 7. See http://server/runs/id-1 \n"
        "Correct the command or its input; the end of the log shows what went wrong (user.exit).\n"
        "The last log lines:\n  epoch 1\n  out of memory"
    )


def test_only_the_end_of_a_long_log_is_shown() -> None:
    shown = describe_failure(FAILED, [f"{number} " + "x" * 600 for number in range(50)]).splitlines()[3:]
    assert [line.split()[0] for line in shown] == [str(number) for number in range(30, 50)]
    assert {len(line) for line in shown} == {502}


def test_the_text_for_a_run_without_capacity_names_what_may_help() -> None:
    assert describe_failure(NO_CAPACITY, ["x"], retry_option="run_retry_policy") == (
        "Run train failed: no capacity, no machine could be had. See http://server/runs/id-1 \n"
        "Try again later, or allow more machines: other GPUs, regions or backends, spot, a higher max_price; "
        "or set run_retry_policy to let the run itself wait for one (capacity.none).\n"
        "The last log lines:\n  x"
    )
    assert describe_failure(NO_CAPACITY).endswith("spot, a higher max_price (capacity.none).")


def test_the_text_for_an_interrupted_run_names_the_option_that_helps() -> None:
    changed: dict[str, Any] = {"category": "", "cause": "", "next_step": "", "exit_status": None}
    taken = replace(FAILED, reason="interrupted_by_no_capacity", message="failed: taken away", **changed)
    assert describe_failure(taken, retry_option="run_retry_policy").splitlines()[1] == (
        'Run it again from a checkpoint, or use spot_policy="on-demand"; or set survive, such as '
        '"4h": another attempt then begins within the same try (spot.interrupted).'
    )
    assert "survive" not in describe_failure(taken)
    # dstack retries a lost machine only together with commands that fail.
    lost = replace(FAILED, reason="instance_unreachable", message="failed: lost", **changed)
    assert "survive" not in describe_failure(lost, retry_option="run_retry_policy")


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (FAILED, RunUserError),
        (NO_CAPACITY, NoCapacityError),
        (replace(FAILED, status=RunStatus.TERMINATED, reason="stopped_by_user"), RunStoppedError),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_the_error_of_a_run_has_the_same_text(outcome: Outcome, kind: type[RunFailedError]) -> None:
    raise_for_outcome(DONE, ["x"])
    with pytest.raises(kind) as caught:
        raise_for_outcome(outcome, ["x"], retry_option="retry_policy")
    assert type(caught.value) is kind
    assert caught.value.message == describe_failure(outcome, ["x"], retry_option="retry_policy")
    assert caught.value.outcome == outcome


def test_a_status_in_one_line() -> None:
    assert describe_status("train", RunStatus.RUNNING) == "Run train: running"
    assert describe_status("train", "provisioning", "pulling") == "Run train: provisioning (pulling)"


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (StopState.ENDED, "Run train has ended."),
        (StopState.STOPPING, "Run train is stopping."),
        (StopState.ACCEPTED, "The server accepted the stop of run train."),
        (StopState.MISSING, "There is no run train to stop."),
        (StopState.OTHER_OWNER, "Run train belongs to another owner now; it was left alone: http://page"),
        (
            StopState.REFUSED,
            "The server refused to stop run train: no right. "
            "The run keeps running, until its max_duration if it has one: http://page",
        ),
        (
            StopState.UNCONFIRMED,
            "Could not confirm that run train is stopping: no right. It may keep running, until its "
            "max_duration if it has one. A reaper stops it. Check it and stop it on its page: http://page",
        ),
    ],
)
def test_a_stop_is_described_by_what_is_known_after_it(state: StopState, text: str) -> None:
    result = StopResult("train", "http://page", state, 1, "no right")
    assert describe_stop(result, backstop="A reaper stops it") == text


def test_a_stop_that_saw_the_end_describes_how_the_run_ended() -> None:
    stopped = replace(FAILED, status=RunStatus.TERMINATED, message="was stopped on request")
    result = StopResult("train", "http://page", StopState.ENDED, 1, outcome=stopped)
    assert describe_stop(result) == describe_end(stopped) == "Run train was stopped on request."
