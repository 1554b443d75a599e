"""Secrets show up nowhere in Prefect: not in logs, parameters, artifacts, results, or the process list."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from prefect_dstack._secrets import secrets_in

from .support import log_records
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")
WORD, PASSWORD, KEY = "open-sesame-77", "docker-pass-44", "first line of a key\nsecond line of a key"


def task(token: str) -> Task:
    commands = [
        'echo "it is $WORD after $STEPS, not docker-pass-44"',
        'echo "$KEY"',
        f"echo token {token}",
        "sleep 0.5",
        "echo the-end",
        "exit 3",
    ]
    auth: Any = {"username": "robot", "password": PASSWORD}
    env: Any = {"WORD": WORD, "KEY": KEY, "STEPS": "100000"}
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

    with pytest.raises(Exception, match="it is") as failed:
        secretive(credentials, "train")
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert "it is *** after 100000, not ***" in told
    assert "\n***\n***\ntoken ***" in told
    held = kept(ids[0])
    assert '"what":"train"' in held
    assert "run_task" in held
    for secret in (WORD, PASSWORD, KEY.splitlines()[0], dstack.token):
        assert secret not in told
        assert secret not in held
        assert secret not in f"{failed.value!r} {failed.value}"
    # The job's own shell is started with its commands, as a container would be: that is what the user wrote.
    ours = [line for line in processes if "echo token" not in line]
    assert ours
    assert not [line for line in ours if WORD in line or PASSWORD in line or dstack.token in line]


def test_what_prefect_itself_sets_stays_readable_but_for_how_to_log_in() -> None:
    assert secrets_in(
        {
            "WORD": "a-word",
            "PREFECT_API_URL": "an-address",
            "PREFECT_API_KEY": "a-key",
            "PREFECT_API_AUTH_STRING": "a-login",
        }
    ) == ["a-word", "a-key", "a-login"]
