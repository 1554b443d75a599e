"""The type of an outcome that is a dict has the keys of ``Outcome``, and is one that pydantic checks."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

from pydantic import TypeAdapter

from dstack_core import Outcome, OutcomeDict, RunStatus


def test_the_keys_are_the_fields_of_an_outcome() -> None:
    names = {field.name for field in fields(Outcome)}
    assert OutcomeDict.__required_keys__ == names
    assert OutcomeDict.__optional_keys__ == {"skipped"}


def test_an_outcome_is_written_with_the_types_that_it_declares() -> None:
    outcome = Outcome(
        run_name="train",
        run_id="1",
        project="main",
        status=RunStatus.DONE,
        exit_status=0,
        reason=None,
        message="finished",
        cost=1.5,
        duration=2.0,
        instance=None,
        backend=None,
        region=None,
        price_per_hour=None,
        url="http://s",
        metrics={"loss": float("nan")},
    )
    plain = outcome.to_dict()
    assert TypeAdapter(OutcomeDict).validate_python(plain, strict=True) == plain
    assert plain["metrics"] == {"loss": "nan"}
    assert set(get_type_hints(OutcomeDict)) == {*plain, "skipped"}
    # What a newer version adds stays.
    assert Outcome.from_dict({**plain, "later": 1}).to_dict() == {**plain, "metrics": {"loss": "nan"}}
