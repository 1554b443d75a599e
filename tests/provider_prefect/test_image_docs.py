"""The blocks of the guide to images, as far as they can be checked without Docker."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun

from prefect_dstack import DstackWorker
from prefect_dstack._worker_variables import DstackJobConfiguration, DstackVariables
from tests.docs.blocks import ROOT, Block, blocks, blocks_of

PAGE = ROOT / "docs" / "how-to" / "images-for-the-worker.md"
BLOCKS = blocks_of(PAGE)
(REQUIREMENTS,) = blocks("text requirements")
FILES = [block for block in BLOCKS if block.info == "yaml prefect"]


def test_the_guide_names_the_version_of_prefect_that_is_tested() -> None:
    pinned = re.search(r"^prefect==(\S+)", (ROOT / "constraints/prefect-runners.txt").read_text(), re.M)
    assert pinned
    assert set(re.findall(r"prefect(?:==|/prefect:)([\d.]+)", PAGE.read_text())) == {pinned[1]}


@pytest.mark.parametrize("block", blocks("dockerfile prefect"), ids=str)
def test_an_image_has_prefect_and_the_files_of_the_page(block: Block) -> None:
    base, *instructions = block.code.splitlines()
    assert re.fullmatch(r"FROM [a-z]+/[a-z]+:\S+", base)
    assert {line.split()[0] for line in instructions} <= {"COPY", "RUN"}
    assert base.startswith("FROM prefecthq/prefect:") or "prefect==" in block.code
    for line in instructions:
        if line.startswith("COPY"):
            assert line == "COPY requirements.txt ."
            assert f"`{line.split()[1]}`" in PAGE.read_text()


def test_the_requirements_are_requirements() -> None:
    for line in REQUIREMENTS.code.splitlines():
        assert re.fullmatch(r"[a-z-]+(==[\d.]+)?", line)


@pytest.mark.parametrize("block", FILES, ids=str)
def test_the_pull_steps_exist_and_take_these_inputs(block: Block) -> None:
    for step in yaml.safe_load(block.code)["pull"]:
        ((path, inputs),) = step.items()
        module, _, name = path.rpartition(".")
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
        assert set(inputs) - {"id"} <= set(parameters)


def job(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the task that the worker would submit for a deployment with these variables."""
    template = DstackWorker.get_default_base_job_template()["job_configuration"]
    values = DstackVariables.model_validate(variables).model_dump(exclude_unset=True)
    made = DstackJobConfiguration.model_validate(values)
    assert set(values) <= set(template)
    made.prepare_for_flow_run(FlowRun.model_validate({"flow_id": "0" * 32, "id": "1" * 32, "name": "one"}))
    return made.task()


def test_the_deployments_machine_runs_the_flow_run_in_the_image() -> None:
    ((deployment,),) = [
        made["deployments"] for block in FILES if "deployments" in (made := yaml.safe_load(block.code))
    ]
    variables = deployment["work_pool"]["job_variables"]
    task = job(variables)
    assert task["image"] == variables["image"]
    assert task["commands"] == ["prefect flow-run execute"]
    assert task["registry_auth"]["username"] == "team"
    # Without an image it is the one that the guide builds on.
    assert re.fullmatch(r"prefecthq/prefect:[\d.]+-python3\.\d+", job({})["image"])
