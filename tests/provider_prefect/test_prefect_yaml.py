"""The `prefect.yaml` of the how-to guide: Prefect's own command deploys it, and the worker's variables accept it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectAlreadyExists

from prefect_dstack._worker_variables import DstackVariables
from tests.docs.blocks import ROOT, blocks_of

from .machines import new_pool

pytestmark = pytest.mark.usefixtures("prefect_server")
PAGE = ROOT / "docs" / "how-to" / "deploy-to-a-work-pool.md"


def test_prefect_deploys_the_file_of_the_guide(tmp_path: Path) -> None:
    names = {"yaml prefect": "prefect.yaml", "python prefect": "flows.py"}
    for block in blocks_of(PAGE):
        if block.info in names:
            (tmp_path / names[block.info]).write_text(block.code)
    with suppress(ObjectAlreadyExists):
        new_pool("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        env=os.environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        nightly, smoke = (
            client.read_deployment_by_name(f"train/{name}") for name in ("nightly", "smoke-test")
        )
    assert nightly.work_pool_name == smoke.work_pool_name == "gpu"
    assert [schedule.schedule.cron for schedule in nightly.schedules] == ["0 2 * * *"]  # type: ignore[union-attr]
    assert (nightly.parameters, smoke.parameters) == ({"epochs": 10}, {"epochs": 1})
    (step,) = nightly.pull_steps or []
    assert list(step) == ["prefect.deployments.steps.git_clone"]
    for deployment in (nightly, smoke):
        assert set(deployment.job_variables) <= set(DstackVariables.model_fields)
        variables = DstackVariables.model_validate(deployment.job_variables)
        assert variables.max_duration == deployment.job_variables["max_duration"]
    assert nightly.job_variables["max_price"] == 4.0
