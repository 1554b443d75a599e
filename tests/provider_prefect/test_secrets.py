"""Secrets show up nowhere in Prefect: not in logs, parameters, artifacts, results, or the process list."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run
from pydantic import SecretStr

from dstack_core import ConfigurationError, Task
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    arun_task,
    dstack_task,
    run_task,
    submit_run,
    wait_for_run,
)
from prefect_dstack import dstack as dstack_machine
from prefect_dstack._secrets import GitLogin, Masking, names_of_secrets, shown_env
from prefect_dstack._submission import resolve
from prefect_dstack._worker_variables import DstackJobConfiguration

from .support import log_records
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")
WORD, PASSWORD, KEY = "open-sesame-77", "docker-pass-44", "first line of a key\nsecond line of a key"


def task(token: str) -> Task:
    commands = [
        'echo "it is $WORD_TOKEN after $STEPS, not docker-pass-44"',
        'echo "$STAGE-ing of $MODEL"',
        'echo "$KEY"',
        f"echo token {token}",
        "sleep 0.5",
        "echo the-end",
        "exit 3",
    ]
    auth: Any = {"username": "robot", "password": PASSWORD}
    env: Any = {"WORD_TOKEN": WORD, "KEY": KEY, "STEPS": "100000", "STAGE": "train", "MODEL": "llama"}
    return Task(commands=commands, env=env, image="registry.example.com/train", registry_auth=auth)


def kept(flow_run_id: UUID) -> str:
    """Return all that Prefect's server holds of a flow run and its tasks, apart from its log."""
    with get_client(sync_client=True) as client:
        of_it = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        held: list[Any] = [
            client.read_flow_run(flow_run_id),
            client.read_flow_run_states(flow_run_id),
            client.read_artifacts(artifact_filter=of_it),
            client._client.post("/task_runs/filter", json={}).json(),
        ]
    return "\n".join(
        one.model_dump_json() if hasattr(one, "model_dump_json") else json.dumps(one, default=str)
        for item in held
        for one in (item if isinstance(item, list) else [item])
    )


@pytest.mark.parametrize("way", [run_task, arun_task])
def test_secrets_are_in_no_log_parameter_artifact_or_state(
    dstack: LocalServer, credentials: DstackCredentials, way: Any
) -> None:
    ids: list[UUID] = []
    processes: list[str] = []

    @flow
    def secretive(block: DstackCredentials, what: str) -> None:
        ids.append(UUID(flow_run.get_id()))
        future = way.submit(task(dstack.token), block, **(FAST | {"artifacts": True}))
        while not future.state.is_final():
            for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                # It may have ended meanwhile.
                with suppress(psutil.Error):
                    processes.append(" ".join(one.cmdline()))
        future.result()

    with pytest.raises(Exception, match="exited with status 3") as failed:
        secretive(credentials, "train")
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert "it is *** after 100000, not ***" in told
    assert "train-ing of llama\n***\n***\ntoken ***" in told
    held = kept(ids[0])
    assert '"what":"train"' in held
    assert "run_task" in held
    # What the run got beside its secrets is in the table of its outcome.
    assert "| Environment | WORD_TOKEN=***, KEY=*** ***, STEPS=100000, STAGE=train, MODEL=llama |" in held
    for secret in (WORD, PASSWORD, KEY.splitlines()[0], dstack.token):
        assert secret not in told
        assert secret not in held
        assert secret not in f"{failed.value!r} {failed.value}"
    # The job's own shell is started with its commands, as a container would be: that is what the user wrote.
    ours = [line for line in processes if "echo token" not in line]
    assert ours
    assert not [line for line in ours if WORD in line or PASSWORD in line or dstack.token in line]


def test_what_prefect_itself_sets_stays_readable_but_for_how_to_log_in() -> None:
    assert Masking(mask_env="all").secrets_in(
        {
            "WORD_TOKEN": "a-word",
            "PREFECT_API_URL": "an-address",
            "PREFECT_API_KEY": "a-key",
            "PREFECT_API_AUTH_STRING": "a-login",
        }
    ) == ["a-word", "a-key", "a-login"]


NEUTRAL: Any = {"WORD": SecretStr("declared-word-55"), "STAGE": "train", "LICENSE": "license-99"}
ECHOES = {"type": "task", "commands": ['echo "$STAGE-ing with $WORD and $LICENSE"', "echo the-end"]}


@pytest.mark.parametrize(
    ("mask_env", "line"),
    [
        (None, "train-ing with *** and license-99"),
        ("all", "***-ing with *** and ***"),
        ("none", "train-ing with *** and license-99"),
        (["LICENSE"], "train-ing with *** and ***"),
    ],
)
def test_a_secret_block_is_masked_whatever_its_name_by_the_task_that_waits_too(
    credentials: DstackCredentials, mask_env: Any, line: str
) -> None:
    ids: list[UUID] = []
    options: Any = {} if mask_env is None else {"mask_env": mask_env}

    @flow
    def apart() -> None:
        ids.append(UUID(flow_run.get_id()))
        run = submit_run(ECHOES, credentials, env=NEUTRAL, **options)
        assert run["secret_names"] == ["WORD"]
        wait_for_run(run, credentials, poll_interval=0.2)

    apart()
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert line in told
    assert "declared-word-55" not in told + kept(ids[0])


def test_a_block_knows_what_it_was_given_as_a_secret(credentials: DstackCredentials) -> None:
    given: Any = {**NEUTRAL, "LICENSE": Secret(value=SecretStr("of-a-block-66"))}
    block = DstackRun(credentials=credentials, configuration=ECHOES, env=given, mask_env="none")
    assert block.secret_names == ["LICENSE", "WORD"]
    again = DstackRun.model_validate(json.loads(block.model_dump_json(context={"include_secrets": True})))
    assert again.secret_names == ["LICENSE", "WORD"]
    for one in (block, again):
        assert sorted(one._job(GitLogin()).relay.masker._lines) == ["declared-word-55", "of-a-block-66"]


def test_templates_of_blocks_and_variables_are_secrets_of_a_machine() -> None:
    env = {
        "A": "{{ prefect.blocks.secret.token }}",
        "B": "{{ prefect.variables.license }}",
        "C": "train",
        "D": 5,
    }
    assert names_of_secrets(env) == {"A", "B"}
    assert names_of_secrets("{{ env }}") == names_of_secrets(None) == set()
    work_pool: Any = SimpleNamespace(
        name="pool",
        id=UUID(int=2),
        base_job_template={"variables": {"properties": {"env": {"default": env}}}, "job_configuration": {}},
    )
    machine = DstackJobConfiguration(
        command="true", configuration={"registry_auth": {"username": "u", "password": PASSWORD}}
    )
    given: Any = SimpleNamespace(
        id=UUID(int=1), name="flow-run", deployment_id=None, parameters={}, labels={}, job_variables={}
    )
    machine.prepare_for_flow_run(given, work_pool=work_pool)
    values = {"A": "from-a-block", "B": "from-a-variable", "C": "train-it", "API_KEY": "by-its-name"}
    found = machine.secrets_in(values)
    assert sorted(found) == sorted(["from-a-block", "from-a-variable", "by-its-name", PASSWORD])


def test_a_long_environment_is_cut_in_a_table() -> None:
    text = shown_env({"A": "b" * 2000, "PREFECT_API_KEY": "x"}, str)
    assert len(text) < 1100
    assert text.endswith(" [...]")


def ways_to_give(mask_env: Any, credentials: DstackCredentials) -> dict[str, Callable[[], Any]]:
    def nothing() -> None: ...

    return {
        "task": lambda: resolve(ECHOES, {"mask_env": mask_env, "env": NEUTRAL}, GitLogin()),
        "block": lambda: DstackRun(credentials=credentials, configuration=ECHOES, mask_env=mask_env),
        "function": lambda: dstack_task(mask_env=mask_env)(nothing),
        "machine": lambda: dstack_machine(mask_env=mask_env)(flow(nothing)),
        "wait": lambda: Masking.from_dict({}, mask_env),
    }


@pytest.mark.parametrize("way", ["task", "block", "function", "machine", "wait"])
def test_a_wrong_mask_env_is_refused(credentials: DstackCredentials, way: str) -> None:
    ways_to_give(["LICENSE"], credentials)[way]()
    with pytest.raises((ConfigurationError, ValueError), match="mask_env"):
        ways_to_give("secret", credentials)[way]()
