"""The fallbacks that a workflow engine takes: one check for all engines, before anything is submitted."""

from __future__ import annotations

import json
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError
from dstack_core.integration import (
    FALLBACK_OPTIONS,
    Attempt,
    Fallbacks,
    RunRef,
    Steps,
    StepSums,
    host_fallbacks,
    refuse_service,
    split_step,
    step_ref,
)
from dstack_core.local import LocalServer
from dstack_core.models.options import SubmitOptions
from dstack_core.models.run_attempt import RunAttempt

ON_DEMAND = [{"spot_policy": "on-demand"}]


def test_without_fallbacks_there_are_none() -> None:
    assert host_fallbacks(None, None) is None
    assert host_fallbacks([], {}) is None


def test_numbers_may_be_digits_as_json_and_templates_make_them() -> None:
    given: Any = {"137": "next", "9": "2", 3: 2}
    found = host_fallbacks(ON_DEMAND, given)
    assert found == Fallbacks(ON_DEMAND, {137: "next", 9: 2, 3: 2})


def test_each_option_that_a_fallback_can_have_is_one_of_submit() -> None:
    assert set(FALLBACK_OPTIONS) < SubmitOptions.__optional_keys__
    assert list(FALLBACK_OPTIONS) == sorted(FALLBACK_OPTIONS)


@pytest.mark.parametrize(
    ("fallbacks", "on_exit", "text"),
    [
        (None, {137: "next"}, r"^fallback_on_exit: expected fallbacks with it, got none\. Set fallbacks"),
        ([], {137: "next"}, r"^fallback_on_exit: expected fallbacks with it"),
        (ON_DEMAND, [137], r'^fallback_on_exit: expected a dict such as \{137: "next"\}, got \[137\]'),
        (ON_DEMAND, {"oom": "next"}, r"^fallback_on_exit: expected exit statuses from 1 to 255, got 'oom'"),
        (ON_DEMAND, {137: 3}, r"^fallback_on_exit: expected .* 2 to 2, for 137, got 3"),
        ("on-demand", None, r"^fallbacks: expected a list of dicts .* got 'on-demand'"),
        ({"spot_policy": "spot"}, None, r"^fallbacks: expected a list of dicts .* got \{'spot_policy'"),
        (["on-demand"], None, r"^fallbacks: expected a list of dicts"),
        ([*ON_DEMAND, None], None, r"^fallbacks: expected a list of dicts"),
        ([*ON_DEMAND, {"env": {}}], None, r"^fallbacks\[1\]: .* \(backends, .*, survive\), got 'env'"),
        ([{"max_cost": 3}], None, r"^fallbacks\[0\]: .*, got 'max_cost'"),
        ([{"tags": {}}], None, r"^fallbacks\[0\]: .*, got 'tags'"),
    ],
)
def test_what_is_wrong_is_one_error(fallbacks: Any, on_exit: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        host_fallbacks(fallbacks, on_exit)


def test_a_service_has_no_fallbacks() -> None:
    refuse_service(dstack.Task(commands=["true"]))
    with pytest.raises(
        ConfigurationError, match=r"^fallbacks: expected .* a task with it, got that of a ser"
    ):
        refuse_service(dstack.Service(commands=["true"], port=80))


def test_a_marker_shows_its_step() -> None:
    first = RunRef("train", "airflow:etl/nightly/train/1of3#5f1c9a/keep")
    assert split_step(first.marker) == (first.marker, 1)
    assert split_step(step_ref(first, 12).marker) == (first.marker, 12)
    # Step 1 has no such end, so this one belongs to a task of that name.
    assert split_step("plain:nightly/step1") == ("plain:nightly/step1", 1)


def test_an_engine_continues_with_the_step_of_another_attempt() -> None:
    fallbacks = Fallbacks([{"max_price": 2.0}, {"resources": dstack.Resources(memory="64GB..")}])
    with LocalServer() as server, server.client() as client:
        attempt = Attempt(RunRef("train", "plain:nightly/2"))
        steps = Steps(client, dstack.Task(commands=["true"]), attempt, fallbacks, {"max_price": 1.0})
        assert steps.options["max_price"] == 1.0
        earlier = RunRef("train-1", "plain:nightly/1")
        steps.start(earlier, 3)
        assert steps.before() == [earlier, step_ref(earlier, 2)]
        assert steps.begin() == attempt.ref == step_ref(earlier, 3)
        assert steps.options["max_price"] == 1.0
        assert steps.describe().startswith("Step 3 of 3: run train-1-s3 with resources={'memory': ")
        # A step of a job that had more fallbacks.
        steps.start(earlier, 4)
        assert steps.options["resources"] == fallbacks.options[1]["resources"]
        sums = StepSums([RunAttempt(1, cost=0.2), RunAttempt(2, cost=0.3)], cost=0.5, seconds=60.0)
        steps.start(earlier, 2, StepSums.from_dict(json.loads(json.dumps(sums.to_dict()))))
        assert (steps.sums, steps.sums.count) == (sums, 2)
        assert steps.describe() == "Step 2 of 3: run train-1-s2 with max_price=2.0."
