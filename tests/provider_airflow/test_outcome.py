"""Outcomes and errors become results and Airflow's errors."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
from airflow.triggers.base import TriggerEvent

from airflow_provider_dstack._compat import AirflowException, AirflowFailException
from airflow_provider_dstack._outcome import (
    as_airflow_error,
    broken_error,
    broken_event,
    finished_event,
    raise_as_airflow_error,
    result_of,
)
from airflow_provider_dstack.errors import (
    DstackError,
    DstackInfrastructureError,
    DstackLimitExceeded,
    DstackNoCapacity,
    DstackNoFleet,
    DstackRunError,
    DstackRunFailed,
    DstackRunStopped,
    DstackServerUnreachable,
    DstackSpotInterrupted,
    DstackUserError,
)
from airflow_provider_dstack.status_trigger import is_reached
from dstack_core import (
    AccessDeniedError,
    AuthenticationError,
    ConfigurationError,
    Outcome,
    ProjectNotFoundError,
    ProtocolError,
    RequestRejectedError,
    RunNameTakenError,
    RunStatus,
    ServerUnreachableError,
)
from dstack_core.integration import OUTCOME_FIELDS, describe_failure
from tests.provider_airflow.test_relay import OUTCOME

FAILED = replace(
    OUTCOME,
    status=RunStatus.FAILED,
    exit_status=7,
    reason="container_exited_with_error",
    message="failed: its command exited with status 7",
)


# An outcome sums its end up when it is made; a copy with another end does it anew.
UNSET: dict[str, Any] = {"category": "", "cause": "", "next_step": ""}


def test_a_run_that_succeeded_gives_a_plain_result() -> None:
    result = result_of(OUTCOME, ["line"])
    assert list(result) == [field.name for field in OUTCOME_FIELDS]
    assert json.loads(json.dumps(result)) == result
    assert result["status"] == "done"


def test_a_failed_run_shows_its_exit_status_and_last_lines() -> None:
    with pytest.raises(DstackRunFailed, match="status 7") as caught:
        result_of(FAILED, ["epoch 1", "out of memory"])
    assert "\n  epoch 1\n  out of memory" in str(caught.value)
    assert str(caught.value) == describe_failure(FAILED, ["epoch 1", "out of memory"])
    assert caught.value.outcome["exit_status"] == 7
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (again.outcome, again.last_lines) == (caught.value.outcome, ["epoch 1", "out of memory"])


def test_lines_that_the_log_has_are_not_repeated_in_the_error() -> None:
    with pytest.raises(DstackRunFailed) as caught:
        result_of(FAILED, ["epoch 1", "out of memory"], is_tail_shown=True)
    assert str(caught.value) == describe_failure(FAILED)
    assert caught.value.last_lines == ["epoch 1", "out of memory"]


@pytest.mark.parametrize("rest", [None, {"progress": {}}])
def test_what_a_triggerer_logs_of_an_event_has_no_log_lines(rest: dict[str, Any] | None) -> None:
    event = finished_event(FAILED, ["out of memory"], rest, {"skip": None}, is_tail_shown=True)
    fired: Any = TriggerEvent(event)  # type: ignore[no-untyped-call]  # Airflow's is untyped
    assert repr(fired) == f"TriggerEvent<finished: run {FAILED.run_name} failed>"
    # Airflow sends it as JSON.
    assert json.loads(fired.model_dump_json())["payload"] == {
        "kind": "finished",
        "outcome": FAILED.to_dict(),
        "tail": ["out of memory"],
        "is_tail_shown": True,
        **({"reported": {"skip": None}, "since": {}} if rest is None else {"rest": rest}),
    }


def test_an_error_of_the_core_does_not_cause_the_one_with_its_text() -> None:
    with pytest.raises(AirflowFailException, match="max_price") as caught:
        raise_as_airflow_error(ConfigurationError("max_price: wrong"), submitted=False)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    unknown = OSError("disk full")
    with pytest.raises(OSError, match="disk full") as other:
        raise_as_airflow_error(unknown, submitted=False)
    assert other.value is unknown


def test_an_advice_names_only_what_the_caller_has() -> None:
    no_capacity = replace(FAILED, reason="failed_to_start_due_to_no_capacity", **UNSET)
    with pytest.raises(DstackNoCapacity, match="set run_retry_policy to let the run itself wait"):
        result_of(no_capacity, [])
    with pytest.raises(DstackNoCapacity) as caught:
        is_reached({"status": "failed", "outcome": no_capacity.to_dict()}, ["done"])
    assert "run_retry_policy" not in str(caught.value)
    no_fleet = replace(no_capacity, message="No matching fleet found", **UNSET)
    with pytest.raises(DstackNoFleet, match="\n  type: fleet\n") as found:
        is_reached({"status": "failed", "outcome": no_fleet.to_dict()}, ["done"])
    assert "Or create it from code with DstackFleetOperator or dstack_fleet (capacity.no_fleet)." in str(
        found.value
    )


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"reason": "failed_to_start_due_to_no_capacity"}, DstackNoCapacity),
        ({"reason": "interrupted_by_no_capacity"}, DstackSpotInterrupted),
        ({"reason": "max_duration_exceeded"}, DstackLimitExceeded),
        ({"reason": "instance_unreachable"}, DstackInfrastructureError),
        ({"exit_status": 1}, DstackUserError),
        ({"status": RunStatus.TERMINATED, "reason": "stopped_by_user"}, DstackRunStopped),
        ({"status": RunStatus.FAILED, "reason": "something_new"}, DstackRunFailed),
    ],
)
def test_each_kind_of_failure_has_its_own_error(change: dict[str, Any], kind: type[DstackRunError]) -> None:
    with pytest.raises(DstackRunError) as caught:
        result_of(replace(FAILED, **{**UNSET, **change}), [])
    assert type(caught.value) is kind
    assert isinstance(caught.value, AirflowException)


def test_errors_keep_their_outcome_across_processes() -> None:
    error = pickle.loads(pickle.dumps(DstackRunFailed("text", {"exit_status": 7})))  # noqa: S301 - own bytes
    assert (str(error), error.outcome) == ("text", {"exit_status": 7})


def test_a_finished_event_survives_json() -> None:
    event = json.loads(json.dumps(finished_event(FAILED, ["x"])))
    assert Outcome.from_dict(event["outcome"]) == FAILED
    assert event["tail"] == ["x"]


@pytest.mark.parametrize(
    ("error", "submitted", "kind"),
    [
        (ConfigurationError("x"), False, AirflowFailException),
        (AuthenticationError("x"), False, AirflowFailException),
        (AuthenticationError("x"), True, AirflowFailException),
        (AccessDeniedError("x"), False, AirflowFailException),
        (ProjectNotFoundError("x"), False, AirflowFailException),
        (RequestRejectedError("x"), False, AirflowFailException),
        (RequestRejectedError("x"), True, DstackError),
        (RunNameTakenError("x"), False, DstackError),
        (ProtocolError("x"), False, AirflowFailException),
        (ProtocolError("x"), True, DstackError),
        (ServerUnreachableError("x"), False, DstackServerUnreachable),
    ],
)
def test_only_what_a_retry_cannot_help_is_final(
    error: Exception, submitted: bool, kind: type[Exception]
) -> None:
    assert type(as_airflow_error(error, submitted=submitted)) is kind


def test_a_broken_event_comes_back_as_the_same_error() -> None:
    event = json.loads(json.dumps(broken_event(ServerUnreachableError("no answer"))))
    error = broken_error(event)
    assert type(error) is DstackServerUnreachable
    assert str(error) == "no answer"
    assert type(broken_error(broken_event(AuthenticationError("refused")))) is AirflowFailException
    assert type(broken_error(broken_event(KeyError("odd")))) is DstackError


def test_what_airflow_keeps_of_a_run_is_small_whatever_the_server_sends() -> None:
    wordy = replace(FAILED, message="m" * 1_000_000)
    event = finished_event(wordy, ["l" * 500] * 20)
    assert len(json.dumps(event)) < 20_000
    assert event["outcome"]["message"].endswith("m [...]")
    with pytest.raises(DstackRunFailed) as caught:
        result_of(wordy, [])
    assert len(str(caught.value)) < 3_000
    assert len(json.dumps(caught.value.outcome)) < 5_000
    assert len(json.dumps(result_of(replace(OUTCOME, message="m" * 1_000_000), []))) < 5_000
    assert len(json.dumps(broken_event(ServerUnreachableError("m" * 1_000_000)))) < 5_000
