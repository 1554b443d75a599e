"""The task that is made of a work pool's choices."""

from __future__ import annotations

from typing import Any

import prefect
import pytest
from pydantic import ValidationError

from dstack_core import ConfigurationError, Task, load_configuration
from prefect_dstack._machine import DstackJobConfiguration, DstackVariables

ENV = {"PREFECT_API_URL": "https://prefect.example/api"}


def configuration(**fields: Any) -> DstackJobConfiguration:
    return DstackJobConfiguration(command="prefect flow-run execute", **fields)


def test_without_choices_prefects_own_image_is_used() -> None:
    task = configuration().task()
    assert task["image"].startswith(f"prefecthq/prefect:{prefect.__version__}-python3.")
    assert task["commands"] == ["prefect flow-run execute"]
    assert task["max_duration"] == "24h"
    assert isinstance(load_configuration(task), Task)


def test_fields_win_over_further_keys_and_environments_are_joined() -> None:
    task = configuration(
        image="mine",
        env={"A": "1"},
        resources={"gpu": 1},
        configuration={"image": "other", "fleets": ["f"], "env": ["A=0", "B=2"], "max_duration": "1h"},
    ).task()
    assert (task["image"], task["fleets"], task["max_duration"]) == ("mine", ["f"], "1h")
    assert task["env"] == {"A": "1", "B": "2"}


def test_a_python_instead_of_an_image_is_left_alone() -> None:
    assert "image" not in configuration(configuration={"python": "3.11"}).task()


def test_a_service_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="service"):
        configuration(configuration={"type": "service"}).task()


@pytest.mark.parametrize(
    "local", ["http://127.0.0.1:4200/api", "http://localhost:4200/api", "http://[::1]/api"]
)
def test_an_address_that_no_machine_can_reach_is_refused(local: str) -> None:
    made = configuration(env={"PREFECT_API_URL": local})
    with pytest.raises(ConfigurationError, match="no other machine can reach"):
        made.check_reach("https://dstack.example")
    made.check_reach("http://localhost:3000")


def test_a_missing_address_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        configuration().check_reach("https://dstack.example")
    configuration(env=ENV).check_reach("https://dstack.example")


@pytest.mark.parametrize(
    ("field", "value"), [("max_price", 0), ("poll_interval", 0), ("spot_policy", "cheap")]
)
def test_a_wrong_choice_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        DstackVariables(**{field: value})


def test_every_choice_is_described() -> None:
    for name, field in DstackVariables.model_fields.items():
        assert (field.description or "").endswith("."), name
