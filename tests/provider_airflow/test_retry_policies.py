"""A task is tried again by the failure category of its run."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_dstack import retry_policies
from airflow_provider_dstack._compat import has_retry_policies
from airflow_provider_dstack._outcome import result_of
from airflow_provider_dstack.errors import (
    DstackInfrastructureError,
    DstackLimitExceeded,
    DstackNoCapacity,
    DstackRunError,
    DstackRunInterrupted,
    DstackServerUnreachable,
    DstackSpotInterrupted,
    DstackUserError,
)
from airflow_provider_dstack.retry_policies import DstackRetryPolicy
from dstack_core import Outcome, ServerUnreachableError
from tests.provider_airflow.test_relay import OUTCOME

needs_policies = pytest.mark.skipif(not has_retry_policies(), reason="Airflow has retry policies since 3.3")
ENDS = {
    "failed_to_start_due_to_no_capacity": (DstackNoCapacity, "retry"),
    "interrupted_by_no_capacity": (DstackSpotInterrupted, "retry"),
    "instance_unreachable": (DstackInfrastructureError, "retry"),
    "server_error": (DstackInfrastructureError, "retry"),
    "container_exited_with_error": (DstackUserError, "fail"),
    "max_duration_exceeded": (DstackLimitExceeded, "fail"),
    "terminated_due_to_utilization_policy": (DstackLimitExceeded, "fail"),
}


def error_of(reason: str) -> DstackRunError:
    changes: dict[str, Any] = {"status": "failed", "reason": reason, "message": "failed", "exit_status": None}
    known = {k: v for k, v in OUTCOME.to_dict().items() if k not in ("category", "cause", "next_step")}
    with pytest.raises(DstackRunError) as caught:
        result_of(Outcome.from_dict(known | changes), [])
    return caught.value


def decide(policy: DstackRetryPolicy, error: BaseException) -> tuple[str, timedelta | None]:
    decision = policy.evaluate(error, try_number=1, max_tries=3)
    return decision.action.value, decision.retry_delay


@pytest.mark.parametrize(("reason", "expected"), ENDS.items())
@needs_policies
def test_the_default_retries_what_may_pass(reason: str, expected: tuple[type, str]) -> None:
    error = error_of(reason)
    assert (type(error), decide(DstackRetryPolicy(), error)[0]) == expected


@needs_policies
def test_any_other_failure_is_left_to_airflow() -> None:
    policy = DstackRetryPolicy()
    assert decide(policy, DstackServerUnreachable("no answer"))[0] == "retry"
    assert decide(policy, ServerUnreachableError("no answer"))[0] == "retry"
    assert decide(policy, DstackRunInterrupted("killed"))[0] == "default"
    assert decide(policy, ValueError("my own"))[0] == "default"


@needs_policies
def test_a_delay_is_that_of_the_most_specific_name() -> None:
    delays = {"capacity": timedelta(minutes=10), "spot": timedelta(seconds=30)}
    policy = DstackRetryPolicy(["capacity", "spot", "server"], delay=delays)
    for one in (policy, DstackRetryPolicy.deserialize(json.loads(json.dumps(policy.serialize())))):
        assert decide(one, error_of("failed_to_start_due_to_no_capacity"))[1] == timedelta(minutes=10)
        assert decide(one, error_of("interrupted_by_no_capacity"))[1] == timedelta(seconds=30)
        assert decide(one, error_of("server_error")) == ("retry", None)
    same = DstackRetryPolicy(delay=timedelta(seconds=5))
    assert decide(DstackRetryPolicy.deserialize(same.serialize()), error_of("server_error"))[1] == same.delay


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (5, "delay: expected a timedelta, 0 or more, got 5"),
        (timedelta(-1), "delay: expected a timedelta, 0 or more, got datetime.timedelta"),
        ({"spot": 5}, r"delay\['spot'\]: expected a timedelta, 0 or more, got 5"),
        ({"spot": None}, r"delay\['spot'\]: expected a timedelta, 0 or more, got None"),
        ({"machine": timedelta(-1)}, r"delay\['machine'\]: expected a timedelta"),
    ],
)
@needs_policies
def test_a_delay_is_a_time_that_passes(delay: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DstackRetryPolicy(delay=delay)
    assert DstackRetryPolicy(delay=timedelta(0)).delay == timedelta(0)


@needs_policies
def test_a_name_that_does_not_exist_is_refused_in_the_dag_file() -> None:
    with pytest.raises(ValueError, match=r"retry_on: expected failure categories .* got 'capcity'"):
        DstackRetryPolicy(["capcity"])
    with pytest.raises(ValueError, match="delay: expected failure categories"):
        DstackRetryPolicy(delay={"capcity": timedelta(seconds=1)})


def test_an_airflow_without_policies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_policies, "has_retry_policies", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected Airflow 3.3 or newer"):
        DstackRetryPolicy()
