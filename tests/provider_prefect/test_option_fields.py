"""Tasks, block and work pool have every submit option of ``dstack_core``, and pass each on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import prefect_dstack
from dstack_core import CommonOptions, SubmitOptions
from prefect_dstack import DstackCredentials, DstackRun
from prefect_dstack._options import OPTION_NAMES, STEP_NAMES
from prefect_dstack._secrets import GitLogin
from prefect_dstack._submission import resolve
from prefect_dstack._worker_variables import _FIELDS as IN_A_POOL
from prefect_dstack._worker_variables import DstackJobConfiguration, DstackVariables
from tests.option_values import CONFIGURATION, VALUES, write_profiles

# What a flow run's code needs besides the options of the core, where they are parameters of the client.
OWN_OPTIONS = {"profiles_file", "repo_dir", "local_repo", "git_credentials", "mask_env", *STEP_NAMES}
TASKS = ["run_task", "arun_task", "submit_run", "asubmit_run", "deploy_service", "adeploy_service"]
# Parameters and fields that are not options, each with its reason.
NO_OPTIONS = {
    "configuration": "what is submitted",
    "credentials": "of the client: server and token",
    "run_name": "which run it is; a flow run of a pool has its own",
    "poll_interval": "how it waits",
    "retry_budget": "how it waits; a worker never gives up",
    "stream_logs": "what is logged",
    "stream_output": "what is logged",
    "log_budget_bytes": "how much is logged",
    "log_timestamps": "what is logged",
    "artifacts": "what is reported",
    "callbacks": "who is called while a run is followed",
    "on_crash": "what is left behind",
    "secret_names": "of a block: what its env was made of",
    "on_active": "what is done to an active service",
    "wait": "whether a service is waited for",
    "options": "the options, unpacked",
    "image": "of a pool: a key of the configuration, which Prefect needs",
    "name": "Prefect's own",
    "labels": "Prefect's own",
    "command": "Prefect's own",
    "uploads": "what the pool allows",
}


def test_the_options_are_those_of_the_core_and_their_own() -> None:
    assert SubmitOptions.__optional_keys__ | OWN_OPTIONS == OPTION_NAMES
    # ``env`` may hold secrets here, so it has a type of its own.
    assert SubmitOptions.__optional_keys__ - CommonOptions.__optional_keys__ == {"env"}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_unpacks_the_options_and_repeats_none(name: str) -> None:
    parameters = inspect.signature(getattr(prefect_dstack, name).fn, eval_str=False).parameters
    assert parameters["options"].annotation == "Unpack[SubmitOptions]"
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert set(parameters) <= set(NO_OPTIONS)


def test_the_block_has_every_option_and_nothing_else() -> None:
    assert set(DstackRun.model_fields) - set(NO_OPTIONS) == OPTION_NAMES


@pytest.mark.parametrize("kind", [DstackVariables, DstackJobConfiguration])
def test_a_work_pool_has_every_option_and_nothing_else(kind: Any) -> None:
    # A flow run returns its results through Prefect.
    wanted = {IN_A_POOL.get(name, name) for name in OPTION_NAMES - {"reports"}}
    assert set(kind.model_fields) - set(NO_OPTIONS) == wanted


def sent_by_task(given: Mapping[str, Any]) -> dict[str, Any]:
    return resolve(CONFIGURATION, given, GitLogin()).arguments


def sent_by_block(given: Mapping[str, Any]) -> dict[str, Any]:
    token = SecretStr("t")
    credentials = DstackCredentials(server_url="http://server", project_name="main", user_token=token)
    return DstackRun(credentials=credentials, configuration=CONFIGURATION, **given)._job(GitLogin()).spec


def sent_by_pool(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {IN_A_POOL.get(name, name): value for name, value in given.items()}
    chosen = DstackVariables(**fields).model_dump(exclude_unset=True)
    made = DstackJobConfiguration(command="true", configuration={"image": "x"}, **chosen)
    return made.submission(GitLogin()).arguments


@pytest.mark.parametrize("name", sorted(SubmitOptions.__optional_keys__))
@pytest.mark.parametrize("sent", [sent_by_task, sent_by_block, sent_by_pool], ids=lambda way: way.__name__)
def test_every_option_is_passed_on(sent: Any, name: str, tmp_path: Path) -> None:
    file = {"profiles_file": str(write_profiles(tmp_path))}
    # Runs report by default, except for those of a pool.
    value = False if name == "reports" else VALUES[name]
    told, without = sent({name: value, **file}).get(name), sent(file).get(name)
    assert getattr(told, "name", told) == value
    assert without != value or (name == "reports" and sent is sent_by_pool)
