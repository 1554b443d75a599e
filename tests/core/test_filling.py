"""What a configuration leaves open is filled in where it is submitted, or refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core import Configuration, ConfigurationError, load_configuration
from dstack_core._wire.filling import fill_in

TASK = {"type": "task", "commands": ["x"]}


def filled(data: dict[str, Any], **given: Any) -> Configuration:
    arguments = {"env": None, "args": None, "environ": {}, **given}
    return fill_in(load_configuration({**TASK, **data}), **arguments)


def test_names_without_a_value_are_filled_in() -> None:
    wanted = filled(
        {"env": ["A", "B=1", "C", "D="]}, env={"C": "given", "B": "2"}, environ={"A": "here", "C": "no"}
    )
    assert wanted.env == {"A": "here", "B": "2", "C": "given", "D": ""}


def test_what_is_missing_is_one_error_with_all_names() -> None:
    with pytest.raises(ConfigurationError) as caught:
        filled({"env": ["A", "B=1", "C"]}, environ={"B": "2"})
    assert str(caught.value) == (
        'env: expected values for A, C, got none. Pass env={"A": ..., "C": ...}, or set them in the '
        "environment of this process."
    )
