"""Flow code, values and secrets that a worker sends to the machine of a flow run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from pydantic import SecretStr

from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials

from .machines import EXECUTE, START_SECONDS, deploy, new_pool, start, worker
from .specs import git_login, private_checkout, specs
from .support import log_records, state_of, submissions, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.matrix,
    pytest.mark.usefixtures("prefect_server"),
]

FLOW = """
from pathlib import Path
from prefect import flow
from helper import WORD

@flow(log_prints=True)
def told() -> None:
    print("word", WORD)
    print("code", Path(__file__).resolve())
"""


@pytest.fixture
def pool() -> str:
    """Create a work pool that allows uploads."""
    name = new_pool()
    with get_client(sync_client=True) as client:
        template = client.read_work_pool(name).base_job_template
        template["job_configuration"]["uploads"] = "allowed"
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    return name


def deploy_from(folder: Path, entrypoint: str, pool: str, **variables: Any) -> UUID:
    """Deploy a flow of a directory, without a remote, and return the deployment's id."""
    loaded: Any = flow.from_source(source=str(folder), entrypoint=entrypoint)
    made = loaded.deploy(
        name=pool,
        work_pool_name=pool,
        job_variables={"command": EXECUTE, "poll_interval": 0.5, **variables},
        build=False,
        push=False,
        print_next_steps=False,
    )
    return UUID(str(made))


def test_a_machine_gets_the_code_from_the_deployments_directory(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    folder = tmp_path / "my flows"
    folder.mkdir()
    (folder / "told.py").write_text(FLOW)
    (folder / "helper.py").write_text("WORD = 'from-the-upload'\n")
    flow_run = start(deploy_from(folder, "told.py:told", pool, repo_dir="."))
    # The machine is this one: before it starts, the directory that it must not use goes away.
    dstack.faults.add("/runs/apply", times=None, status=503)
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: submissions(dstack), seconds=START_SECONDS)
        shutil.rmtree(folder)
        dstack.faults.clear()
        messages = log_records(flow_run.id, last="code", seconds=START_SECONDS)
        until(lambda: state_of(flow_run.id).is_final(), seconds=60)
    assert state_of(flow_run.id).is_completed(), messages
    assert "word from-the-upload" in messages
    (code,) = [Path(message.removeprefix("code ")) for message in messages if message.startswith("code ")]
    assert (code.name, code.parent.name) == ("told.py", "workflow")
    assert folder.is_symlink()


def test_values_secrets_and_credentials_reach_the_machine(
    pool: str,
    dstack: LocalServer,
    credentials: DstackCredentials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = private_checkout(tmp_path / "code")
    (work / ".dstack").mkdir()
    (work / ".dstack" / "profiles.yml").write_text("profiles: [{name: night, max_price: 2.5}]")
    secret: Any = Secret(value=SecretStr("hf_of-a-block"))
    secret.save("hf-token", overwrite=True)
    secret.value = SecretStr("ghp_of-a-block")
    secret.save("git-token", overwrite=True)
    monkeypatch.setenv("OF_THE_WORKER", "known-here")
    credentials.save("for-the-code", overwrite=True)
    placeholder = "{{ prefect.blocks.secret.hf-token }}"
    deployment = deploy(
        pool,
        credentials="for-the-code",
        command="echo ${{ run.args }}; exit 3",
        args=["two words"],
        env={"HF_TOKEN": placeholder},
        retry=True,
        resources="24GB..",
        repo_dir=str(work),
        profile="night",
        git_credentials="secret/git-token",
        configuration={"env": ["HF_TOKEN", "OF_THE_WORKER"]},
    )
    flow_run = start(deployment)
    with worker(None, pool, tmp_path / "log"):
        (spec,) = until(lambda: specs(dstack) if submissions(dstack) else [], seconds=START_SECONDS)
        messages = log_records(flow_run.id, last="Run ", seconds=START_SECONDS)
    sent = spec["configuration"]
    assert (sent["env"]["HF_TOKEN"], sent["env"]["OF_THE_WORKER"]) == ("hf_of-a-block", "known-here")
    assert sent["commands"] == ["echo 'two words'; exit 3"]
    assert sent["retry"]
    assert sent["resources"]["gpu"]["memory"] == {"min": 24.0, "max": None}
    assert spec["profile"]["name"] == "night"
    assert (sent["max_price"] or spec["profile"]["max_price"]) == 2.5
    assert sent["max_duration"] == 24 * 3600
    login = git_login(dstack, spec)
    assert (login["oauth_token"], login["private_key"]) == ("ghp_of-a-block", None)
    log = "\n".join([*messages, (tmp_path / "log").read_text()])
    assert "hf_of-a-block" not in log
    assert "ghp_of-a-block" not in log


def test_a_missing_value_crashes_the_flow_run_with_its_name(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    pool = new_pool()
    credentials.save("for-the-code", overwrite=True)
    flow_run = start(
        deploy(pool, credentials="for-the-code", configuration={"env": ["HF_TOKEN", "WANDB_KEY"]})
    )
    with worker(None, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
    assert state_of(flow_run.id).is_crashed()
    assert "env: expected values for HF_TOKEN, WANDB_KEY" in str(state_of(flow_run.id).message)
    assert submissions(dstack) == 0
