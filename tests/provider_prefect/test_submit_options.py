"""The options that all ways to submit have in common: the same names, and the same meaning everywhere."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, unmapped
from prefect.blocks.system import Secret
from pydantic import SecretStr

import prefect_dstack
from dstack_core import ConfigurationError, Resources, Task
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    arun_and_report,
    arun_task,
    asubmit_run,
    run_and_report,
    run_task,
    submit_run,
)
from prefect_dstack._options import SubmitOptions
from prefect_dstack._secrets import GitLogin
from prefect_dstack._submission import resolve
from prefect_dstack._worker_variables import DstackVariables

from .specs import specs
from .support import submissions

pytestmark = pytest.mark.usefixtures("prefect_server")

TOKEN = "hf_a-token-of-this-test"
SHORT = {"type": "task", "commands": ["echo the-end"]}
# A work pool has these under the keys of a .dstack.yml.
IN_A_POOL = {"retry_policy": "retry"}

Submit = Callable[..., None]


def by_run_task(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    @flow
    def running() -> None:
        run_task(configuration, block, poll_interval=0.1, **options)

    running()


def by_arun_task(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    @flow
    async def arunning() -> None:
        await arun_task(configuration, block, poll_interval=0.1, **options)

    asyncio.run(arunning())


def by_submit_run(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    @flow
    def submitting() -> None:
        submit_run(configuration, block, **options)

    submitting()


def by_asubmit_run(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    @flow
    async def asubmitting() -> None:
        await asubmit_run(configuration, block, **options)

    asyncio.run(asubmitting())


def by_block(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    DstackRun(credentials=block, configuration=configuration, poll_interval=0.1, **options).trigger()


def by_async_block(configuration: Any, block: DstackCredentials, **options: Any) -> None:
    run = DstackRun(credentials=block, configuration=configuration, poll_interval=0.1, **options)
    asyncio.run(run.atrigger())


WAYS: list[Submit] = [
    by_run_task,
    by_arun_task,
    by_submit_run,
    by_asubmit_run,
    by_block,
    by_async_block,
]
ALL_WAYS = pytest.mark.parametrize("submit", WAYS, ids=lambda way: way.__name__)


@pytest.mark.parametrize(
    "name",
    ["run_task", "arun_task", "submit_run", "asubmit_run", "deploy_service", "adeploy_service"],
)
def test_all_tasks_have_the_same_options(name: str) -> None:
    found = inspect.signature(getattr(prefect_dstack, name).fn, eval_str=False).parameters["options"]
    assert (found.kind, found.annotation) == (inspect.Parameter.VAR_KEYWORD, "Unpack[SubmitOptions]")


@pytest.mark.parametrize("name", sorted(SubmitOptions.__annotations__))
def test_a_block_and_a_work_pool_have_every_option(name: str) -> None:
    assert name in DstackRun.model_fields
    # A flow run on a machine returns its results through Prefect.
    assert (IN_A_POOL.get(name, name) in DstackVariables.model_fields) == (name != "reports")
    assert f"        {name}: " in (run_task.fn.__doc__ or "")


def test_an_option_that_does_not_exist_is_named(dstack: LocalServer, credentials: DstackCredentials) -> None:
    with pytest.raises(TypeError, match=r"max_pric: expected one of the options .*max_price"):
        by_run_task(SHORT, credentials, max_pric=2)
    with pytest.raises(TypeError, match=r"stream_log: .*stream_logs.* Did you mean stream_logs\?"):
        by_run_task(SHORT, credentials, stream_log=False)
    with pytest.raises(TypeError, match=r"bogus: expected .*poll_interval.* Check the spelling"):
        by_run_task(SHORT, credentials, bogus=1)
    assert submissions(dstack) == 0


@pytest.mark.parametrize("way", [by_run_task, by_arun_task])
def test_a_block_that_does_not_exist_is_one_clear_error(way: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"credentials: expected the name .* got 'nope'"):
        way(SHORT, "nope")


@ALL_WAYS
def test_env_fills_names_and_overrides_values(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_HERE", "the-process")
    configuration = {**SHORT, "env": ["HF_TOKEN", "FROM_HERE", "EPOCHS=1", "KEPT=yes"]}
    submit(configuration, credentials, env={"HF_TOKEN": TOKEN, "EPOCHS": 3, "ADDED": "too"})
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {
        "HF_TOKEN": TOKEN,
        "FROM_HERE": "the-process",
        "EPOCHS": "3",
        "KEPT": "yes",
        "ADDED": "too",
    }


@ALL_WAYS
def test_all_names_without_a_value_are_in_one_error(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=r"HF_TOKEN, WANDB_KEY, got none\. Pass env="):
        submit({**SHORT, "env": ["HF_TOKEN", "WANDB_KEY"]}, credentials)
    assert submissions(dstack) == 0


@ALL_WAYS
@pytest.mark.parametrize("kind", [SecretStr, lambda text: Secret(value=text)], ids=["SecretStr", "Secret"])
def test_secrets_are_taken_in_env(
    kind: Callable[[str], Any], submit: Submit, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    # What a Secret block's get() would read as a number.
    submit(SHORT, credentials, env={"HF_TOKEN": kind(TOKEN), "PIN": kind("007"), "SHORT": kind("1e5")})
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {"HF_TOKEN": TOKEN, "PIN": "007", "SHORT": "1e5"}


@pytest.mark.parametrize("submit", WAYS[:4], ids=lambda way: way.__name__)
def test_secrets_are_taken_in_a_configuration(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    auth = {"username": "robot", "password": SecretStr("docker-pass")}
    env = {"HF_TOKEN": Secret(value=SecretStr(TOKEN)), "EPOCHS": 3}
    submit({**SHORT, "env": env, "image": "registry.example.com/x", "registry_auth": auth}, credentials)
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {"HF_TOKEN": TOKEN, "EPOCHS": "3"}
    assert spec["configuration"]["registry_auth"] == {"username": "robot", "password": "docker-pass"}


def test_secrets_are_taken_in_a_task_object(dstack: LocalServer, credentials: DstackCredentials) -> None:
    env: Any = {"HF_TOKEN": SecretStr(TOKEN)}
    by_run_task(Task(commands=["echo the-end"], env=env), credentials)
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {"HF_TOKEN": TOKEN}


@pytest.mark.parametrize("way", [run_and_report, arun_and_report])
def test_the_ready_flow_takes_the_options(
    way: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    credentials.save("for-the-flow", overwrite=True)
    options = {"env": {"EPOCHS": "3"}, "poll_interval": 0.1}
    made = way({**SHORT, "env": ["EPOCHS"]}, "for-the-flow", options=options)
    assert (asyncio.run(made) if asyncio.iscoroutine(made) else made)["status"] == "done"
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {"EPOCHS": "3"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"profile": 3}, "profile: expected the name of a profile"),
        ({"profile": "mine"}, "expected profiles_file or repo_dir with profile 'mine', got neither"),
        ({"profiles_file": 3}, "profiles_file: expected the path"),
        ({"profiles_file": "nope.yml"}, "profiles_file: expected a file at .*nope.yml, got none"),
        ({"repo_dir": 3}, "repo_dir: expected the path"),
        ({"repo_dir": "no-such-directory"}, "repo_dir: expected a directory"),
        ({"local_repo": "yes"}, "local_repo: expected True or False"),
        ({"retry_policy": "yes"}, "^retry_policy: expected a RetryPolicy"),
        (
            {"retry_policy": {"attempts": 3}},
            "^retry_policy: expected a RetryPolicy, True .*got {'attempts': 3}",
        ),
        ({"retry_policy": {"limit": "long"}}, "^retry_policy.limit: expected seconds above 0, .* got 'long'"),
        ({"args": "--epochs 3"}, "args: expected a list"),
        ({"retry_budget": "x"}, "retry_budget: expected 0 seconds or more, got 'x'"),
        ({"stream_logs": "no"}, "stream_logs: expected True or False, got 'no'"),
        ({"artifacts": "no"}, "artifacts: expected True or False, got 'no'"),
        ({"log_timestamps": "yes"}, "log_timestamps: expected True or False, got 'yes'"),
    ],
)
def test_a_wrong_option_is_refused(
    options: dict[str, Any], told: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        by_run_task({"type": "task", "commands": ["echo ${{ run.args }}"]}, credentials, **options)
    assert submissions(dstack) == 0


def test_a_secret_that_prefect_masked_is_refused(dstack: LocalServer, credentials: DstackCredentials) -> None:
    with pytest.raises(ConfigurationError, match="Load the Secret block inside the flow"):
        by_run_task(SHORT, credentials, env={"HF_TOKEN": str(SecretStr(TOKEN))})
    assert submissions(dstack) == 0


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (["HF_TOKEN"], r"env: expected a dict .*, got list\.$"),
        ("HF_TOKEN", r"env: expected a dict .*, got str\. With \.map\(\), pass env=unmapped\("),
        ({"HF_TOKEN": None}, "env: expected text as the value of HF_TOKEN"),
        ({"DEBUG": True}, "env: expected text as the value of DEBUG, got bool"),
    ],
)
def test_a_wrong_env_is_refused(
    env: Any, told: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        by_run_task(SHORT, credentials, env=env)
    assert submissions(dstack) == 0


@ALL_WAYS
def test_args_stand_where_the_commands_name_them(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    submit({"type": "task", "commands": ["echo ${{ run.args }}"]}, credentials, args=["--text", "two words"])
    (spec,) = specs(dstack)
    # Before it is the command of the reports.
    assert spec["configuration"]["commands"][-1] == "echo --text 'two words'"


@ALL_WAYS
@pytest.mark.parametrize("resources", [{"gpu": "16GB..", "memory": "8GB.."}, {"gpu": "A100:80GB:2"}])
def test_the_same_resources_mean_the_same_as_in_the_configuration(
    resources: Any, submit: Submit, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    submit({**SHORT, "name": "as-option"}, credentials, resources=resources)
    submit({**SHORT, "name": "in-the-file", "resources": resources}, credentials)
    one, other = (spec["configuration"]["resources"] for spec in specs(dstack))
    assert one == other


@pytest.mark.parametrize(
    ("retry", "wanted"),
    [
        (True, True),
        ({"on_events": ["no-capacity"], "duration": "1h"}, {"on_events": ["no-capacity"], "duration": 3600}),
        ({"retry": True, "limit": "2h"}, {"on_events": ["no-capacity"], "duration": 7200}),
    ],
)
@ALL_WAYS
def test_retry_is_taken_as_in_yaml_and_as_a_policy(
    submit: Submit, retry: Any, wanted: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    submit({**SHORT, "name": "by-option"}, credentials, retry_policy=retry)
    submit({**SHORT, "name": "in-the-file", "retry": wanted}, credentials)
    one, other = (spec["configuration"]["retry"] for spec in specs(dstack))
    assert one == other


def test_a_resources_object_still_asks_for_minimums(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    by_run_task(SHORT, credentials, resources=Resources(memory="8GB"))
    by_run_task({**SHORT, "resources": Resources(memory="8GB")}, credentials)
    one, other = (spec["configuration"]["resources"] for spec in specs(dstack))
    assert one == other


@pytest.mark.parametrize(
    ("configuration", "told"),
    [
        ({"type": "dev-environment", "ide": "vscode"}, "max_duration"),
        ({**SHORT, "schedule": {"cron": "0 8 * * *"}}, "schedule"),
    ],
)
@pytest.mark.parametrize("submit", [by_run_task, by_arun_task], ids=lambda way: way.__name__)
def test_a_run_that_never_ends_is_refused_by_a_task_that_waits(
    submit: Submit, configuration: Any, told: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        submit(configuration, credentials)
    assert submissions(dstack) == 0


def test_options_that_are_dicts_are_mapped_unmapped(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def mapped() -> list[str]:
        configurations = [{**SHORT, "commands": [f"echo {number}"]} for number in range(2)]
        futures = run_task.map(
            configurations, unmapped(credentials), poll_interval=0.1, env=unmapped({"A": "1"})
        )
        return [future.result()["status"] for future in futures]

    assert mapped() == ["done", "done"]
    assert [spec["configuration"]["env"] for spec in specs(dstack)] == [{"A": "1"}, {"A": "1"}]


def test_secrets_are_not_part_of_what_a_run_is_named_after() -> None:
    login = GitLogin(token="ghp_secret")
    one, other = (
        resolve(
            {**SHORT, "env": {"A": SecretStr(text)}}, {"env": {"B": Secret(value=SecretStr(text))}}, login
        )
        for text in ("first-secret", "rotated-secret")
    )
    assert one.described == other.described
    assert "secret" not in f"{one.described}{one!r}"
    assert (one.arguments["env"], set(one.secrets)) == (
        {"A": "first-secret", "B": "first-secret"},
        {"first-secret", "ghp_secret"},
    )


def test_a_checkout_in_another_folder_is_the_same_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = []
    for name in ("first", "second"):
        folder = tmp_path / name
        (folder / "src").mkdir(parents=True)
        monkeypatch.chdir(folder)
        for repo_dir in ("src", folder / "src", "."):
            described.append(resolve(SHORT, {"repo_dir": repo_dir}, GitLogin()).described)
    assert described[:3] == described[3:]
    assert described[0] == described[1] != described[2]
