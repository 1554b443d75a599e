"""``fallbacks``: a task moves to other machines within its try, by runs of which one at most is alive."""

from __future__ import annotations

import re
from typing import Any

import pytest

from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner

WORK = "echo began; sleep 1.2; echo ended"
ON_DEMAND = "fallbacks=[{'spot_policy': 'on-demand'}]"
BOTH = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])


def task(command: str = WORK, more: str = "") -> str:
    return f"configuration=Task(commands=[{command!r}]), spot_policy='spot', poll_interval=0.3, {more}"


def names(server: LocalServer) -> list[str]:
    """Return the names of all runs, each without what is generated."""
    return [re.sub(r"^dag-\d+-train-[0-9a-z]{8}", "NAME", run.name) for run in server.runs]


def test_after_an_interruption_the_task_moves_to_on_demand(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.scenarios.interrupt_after(0.5, noticed_after=0)
    ended = dag_runner.run(task(more=ON_DEMAND))
    output = capfd.readouterr().out
    assert ended.task_state == "success"
    assert names(server) == ["NAME", "NAME-s2"]
    assert [run.configuration["spot_policy"] for run in server.runs] == ["spot", "on-demand"]
    first, second = (run.marker for run in server.runs)
    assert second == f"{first}/step2"
    print(output)
