"""The dstack task that is made from a work pool's fields."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import prefect
import pytest
from prefect.client.schemas.objects import FlowRun
from pydantic import ValidationError

from dstack_core import ConfigurationError, Task, load_configuration
from prefect_dstack import DstackWorker
from prefect_dstack._bundles import VARIABLE, WITH_CALLER
from prefect_dstack._secrets import GitLogin
from prefect_dstack._worker_variables import (
    _SIGTERM,
    DstackJobConfiguration,
    DstackVariables,
    directory_of,
    place_code,
)

ENV = {"PREFECT_API_URL": "https://prefect.example/api"}


def configuration(**fields: Any) -> DstackJobConfiguration:
    return DstackJobConfiguration(command="prefect flow-run execute", **fields)


def test_without_choices_prefects_own_image_is_used() -> None:
    task = configuration().task()
    assert task["image"].startswith(f"prefecthq/prefect:{prefect.__version__}-python3.")
    assert task["commands"] == ["prefect flow-run execute"]
    assert isinstance(load_configuration(task), Task)


def sent(**fields: Any) -> dict[str, Any]:
    """Return the arguments of the submission, with its configuration."""
    submission = configuration(**fields).submission(GitLogin())
    return {"configuration": submission.configuration, **submission.arguments}


def test_fields_win_over_further_keys_and_environments_are_joined() -> None:
    made = sent(
        image="mine",
        env={"A": "1"},
        resources={"gpu": 1},
        max_duration="2h",
        configuration={"image": "other", "fleets": ["f"], "env": ["A=0", "B=2"], "max_duration": "1h"},
    )
    assert (made["configuration"].image, made["configuration"].fleets) == ("mine", ["f"])
    assert (made["max_duration"], made["resources"], made["env"]) == ("2h", {"gpu": 1}, {"A": "1"})
    assert made["configuration"].env == {"A": "0", "B": "2"}


def test_a_machine_always_has_a_longest_duration() -> None:
    assert sent()["max_duration"] == "24h"
    assert "max_duration" not in sent(configuration={"max_duration": "1h"})


def test_a_name_without_a_value_is_not_sent_as_empty_text() -> None:
    made = sent(configuration={"env": ["HF_TOKEN"]}, env={"OTHER": "x"})
    assert made["configuration"].env == {"HF_TOKEN": None}
    assert made["env"] == {"OTHER": "x"}


@pytest.mark.parametrize("retry", [True, {"on_events": ["no-capacity"], "duration": "1h"}])
def test_retry_is_taken_as_in_yaml(retry: Any) -> None:
    assert DstackVariables(retry=retry).retry == retry
    assert sent(retry=retry)["retry_policy"] == retry


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "reschedule"),
        ({"survive": "4h"}, "relinquish"),
        ({"survive": {"events": ["no-capacity"]}}, "reschedule"),
        ({"retry": True}, "relinquish"),
        ({"retry": {"on_events": ["interruption"]}}, "relinquish"),
        ({"retry": {"on_events": ["no-capacity"]}}, "reschedule"),
        ({"configuration": {"retry": True}}, "relinquish"),
        ({"survive": "4h", "env": {_SIGTERM: "crash"}}, "crash"),
    ],
)
def test_a_flow_run_is_not_crashed_by_the_signal_of_a_machine_that_shuts_down(
    fields: dict[str, Any], expected: str
) -> None:
    made = configuration(**fields)
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="given"))
    assert made.env[_SIGTERM] == expected
    assert made.is_rescheduled == (expected == "reschedule")


def test_a_flow_run_whose_code_is_with_its_caller_is_not_scheduled_again() -> None:
    made = configuration()
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="given", job_variables={VARIABLE: WITH_CALLER}))
    assert _SIGTERM not in made.env
    assert not made.is_rescheduled


def test_resources_are_taken_as_text() -> None:
    assert DstackVariables(resources="24GB..").resources == "24GB.."
    assert sent(resources="24GB..")["resources"] == "24GB.."


def test_a_schedule_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="schedule"):
        sent(configuration={"schedule": {"cron": "0 8 * * *"}})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"repo_dir": "/home/somebody"}, "repo_dir"),
        ({"configuration": {"files": ["/etc/passwd:/tmp/x"]}}, "files"),
        ({"configuration": {"repos": ["/srv/code"]}}, "repos"),
        ({"configuration": {"repos": [{"local_path": "/srv/code"}]}}, "repos"),
    ],
)
def test_files_of_the_workers_machine_are_sent_where_the_pool_allows_it(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf'{named}: expected a work pool .* "uploads": "allowed"'):
        configuration(**fields).task()
    configuration(**fields, uploads="allowed").task()
    configuration(configuration={"repos": ["https://github.com/team/code"]}).task()


def test_only_the_pool_can_allow_uploads() -> None:
    template = DstackWorker.get_default_base_job_template()
    assert "uploads" not in template["variables"]["properties"]
    made: Any = asyncio.run(
        DstackJobConfiguration.from_template_and_values(template, {"uploads": "allowed", "image": "mine"})
    )
    assert (made.uploads, made.image) == ("refused", "mine")


def test_a_directory_that_belongs_to_no_deployment_is_absolute(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"repo_dir: expected an absolute path, got '\.'"):
        configuration(repo_dir=".", uploads="allowed").task()
    task = configuration(repo_dir=str(tmp_path), uploads="allowed").task()
    assert task["commands"] == ["prefect flow-run execute"]


@pytest.mark.parametrize(
    ("steps", "path", "found"),
    [
        (None, "/srv/flows", "/srv/flows"),
        (None, "flows", None),
        (None, None, None),
        ([{"prefect.deployments.steps.set_working_directory": {"directory": "/srv/a/../b"}}], None, "/srv/b"),
        ([{"prefect.deployments.steps.git_clone": {"repository": "https://x/y"}}], "/srv/flows", None),
    ],
)
def test_the_directory_of_a_deployment_is_found(steps: Any, path: str | None, found: str | None) -> None:
    deployment: Any = SimpleNamespace(pull_steps=steps, path=path)
    assert directory_of(deployment) == (None if found is None else Path(found))


def test_the_uploaded_code_is_where_the_deployment_expects_it(tmp_path: Path) -> None:
    code, elsewhere = tmp_path / "code", tmp_path / "no" / "it's here"
    (code / "flows").mkdir(parents=True)
    (code / "flows" / "f.py").write_text("x")
    (command,) = place_code(tmp_path / "no" / "it's here", elsewhere / "flows")
    for _ in range(2):
        subprocess.run(["sh", "-ec", command], env={"DSTACK_REPO_DIR": str(code)}, check=True)
    assert (elsewhere / "flows" / "f.py").read_text() == "x"
    assert place_code(tmp_path / "other", elsewhere) == []


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
