"""Every Airflow block of the documentation is a DAG that runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack._compat import has_retry_policies
from dstack_core.local import LocalServer
from tests.docs.blocks import Block, blocks, check_outputs
from tests.docs.commands import check_options
from tests.provider_airflow.support import DagRunner, poll_often
from tests.provider_airflow.versions import MINOR, DagSerialization, needs_3_2

# The two ways differ only for a DAG that uses a date or another value of its DAG run.
WAYS = [
    pytest.param(block, how, id=f"{block}-{name}")
    for block in blocks("python airflow")
    for name, how in {"triggered": {"logical_date": None}, "scheduled": {}}.items()
    if how or re.search(r"\{\{|date", block.code)
]


@pytest.mark.parametrize(("block", "how"), WAYS)
def test_blocks_run_as_printed(
    block: Block,
    how: dict[str, Any],
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "retry_policy=" in block.code.replace("run_retry_policy=", "") and not has_retry_policies():
        pytest.skip("Airflow has retry policies since 3.3")
    if MINOR < (3, 2) and "AsyncCallback" in block.code:
        pytest.skip("Airflow has deadlines with AsyncCallback in airflow.sdk since 3.2")
    code = block.code
    if MINOR < (3, 2):
        # dag.test() keeps the tasks of the first DAG that has an id.
        code = code.replace('DAG("', f'DAG("line_{block.line}_')
    dag = dag_runner.load(code)
    poll_often(dag)
    if getattr(dag, "deadline", None):
        # Airflow 3.3 stores a deadline of a DAG that is parsed, and not of one that dag.test() runs.
        assert "callback" in json.dumps(DagSerialization.to_dict(dag)["dag"]["deadline"])
        dag.deadline = None
    try:
        assert str(dag.test(**how).state) == "success"
    finally:
        # Each dag.test() reads every file of the folder.
        Path(dag.fileloc).unlink()
    assert server.requests
    check_outputs(block, capfd.readouterr().out)


@needs_3_2
@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("shell airflow"), ids=str)
def test_commands_of_the_documentation_exist_with_their_options(block: Block) -> None:
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        check_options(
            [word for word in words if not word.startswith("-")],
            [word for word in words if word.startswith("-")],
        )
