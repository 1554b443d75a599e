"""Operator, decorator and service operator have every submit option of ``dstack_core``, and pass each on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_dstack._from_operator import submit_arguments
from airflow_provider_dstack._parameters import DEFAULT_REPORTS, RENAMED
from airflow_provider_dstack.decorators import DstackDecoratedOperator, dstack_task
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import SubmitOptions
from tests.option_values import CONFIGURATION, VALUES, write_profiles
from tests.provider_airflow.test_operator import CONTEXT

OPTIONS = SubmitOptions.__optional_keys__
# Parameters of the operator that are not options of ``SubmitOptions``, each with its reason.
NO_OPTIONS = {
    "self": "the operator",
    "kwargs": "Airflow's own",
    "configuration": "what is submitted",
    "run_name": "which run it is",
    "verify_ports": "a check on the worker, a parameter of submit and no option",
    "profiles_file": "where profile is looked up; submit uses the user's home, a worker has none",
    "repo_dir": "of the client in dstack_core: from_config(repo_dir=...)",
    "local_repo": "of the client: from_config(local_repo=...)",
    "git_conn_id": "of the client: from_config(git_private_key=..., oauth_token=...)",
    "dstack_conn_id": "of the client: server and token",
    "project_name": "of the client",
    "deferrable": "how the task waits",
    "on_kill_action": "how the task ends",
    "poll_interval": "how the task waits",
    "retry_budget": "how the task waits",
    "get_logs": "what the task logs",
    "log_budget_bytes": "what the task logs",
    "log_timestamps": "what the task logs",
    "log_groups": "what the task logs",
    "relay_log_again": "what the task logs",
    "mask_env": "what the task shows",
    "skip_on_exit_code": "how the task ends",
    "durable": "how the task is retried",
    "fallbacks": "options of the runs that follow",
    "fallback_on_exit": "when another run follows",
    "returns": "what the task returns",
    "max_report_bytes": "what the task keeps of the run's messages",
    "max_reports_per_second": "what the task keeps of the run's messages",
    "callbacks": "who is called while the task follows its run",
}
# What the other two add: nothing of the run's, but a function, its result, and what is done to an active run.
ADDED: dict[type[DstackRunOperator], set[str]] = {
    DstackServiceOperator: {"on_active"},
    DstackDecoratedOperator: {
        *("python_callable", "op_args", "op_kwargs", "serializer", "max_result_bytes"),
        *("requirements", "modules", "cache_dir", "torchrun", "allow_cloudpickle"),
        *("image", "python", "commands", "registry_auth"),
        # Parts of the configuration, and a shorter name for run_resources.
        *("configuration", "resources", "run_resources"),
    },
}


def field_of(option: str) -> str:
    return RENAMED.get(option, option)


def by_operator(**given: Any) -> DstackRunOperator:
    return DstackRunOperator(task_id="train", configuration=CONFIGURATION, **given)


def by_service_operator(**given: Any) -> DstackRunOperator:
    service = {**CONFIGURATION, "type": "service", "port": 80}
    return DstackServiceOperator(task_id="train", configuration=service, **given)


def by_decorator(**given: Any) -> DstackRunOperator:
    @dstack_task(configuration=CONFIGURATION, **given)
    def train() -> None: ...

    with DAG("options", schedule=None):
        result: Any = train()
    made: DstackRunOperator = result.operator
    return made


WAYS: list[Callable[..., DstackRunOperator]] = [by_operator, by_service_operator, by_decorator]


def test_the_operator_has_every_option_and_nothing_else() -> None:
    parameters = inspect.signature(DstackRunOperator.__init__).parameters
    assert set(parameters) - set(NO_OPTIONS) == {field_of(name) for name in OPTIONS}


@pytest.mark.parametrize("kind", ADDED, ids=lambda kind: kind.__name__)
def test_the_others_take_what_the_operator_takes(kind: type[DstackRunOperator]) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    assert set(parameters) - {"self", "kwargs"} == ADDED[kind]
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_option_is_a_field_and_is_passed_on(
    way: Callable[..., DstackRunOperator], name: str, tmp_path: Path
) -> None:
    file = {"profiles_file": write_profiles(tmp_path)}
    # The operator has another default for what a run reports, and checks it when the DAG is parsed.
    value = {**VALUES, "reports": not DEFAULT_REPORTS}[name]
    given, left_out = way(**{field_of(name): value}, **file), way(**file)
    assert (field_of(name) in given.template_fields) is (name != "reports")
    told, without = (submit_arguments(each, CONTEXT)[name] for each in (given, left_out))
    assert getattr(told, "name", told) == value != without


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_parameter_that_does_not_exist_is_named(way: Callable[..., DstackRunOperator]) -> None:
    with pytest.raises(TypeError, match="max_pric"):
        way(max_pric=2)
