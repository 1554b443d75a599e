"""Small tools of the tests."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Client, Run
from dstack_core.local import LocalServer
from tests.rig.server import RealServer

T = TypeVar("T")

# As the scheduler runs a DAG, and as ``airflow dags trigger`` does: without a logical date.
BOTH_WAYS = pytest.mark.parametrize("how", [{}, {"logical_date": None}], ids=["scheduled", "triggered"])
_NUMBERS = itertools.count(1)
_DAG = """
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import GPU, Resources, RetryPolicy, Service, Task

with DAG({dag_id!r}) as dag:
    DstackRunOperator(task_id="train", {arguments})
"""
_TASKS = """
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, setup, task, task_group, teardown
from airflow_provider_dstack.fleets import DstackDeleteFleetOperator, DstackFleetOperator, dstack_fleet
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.reaper import DstackReapOperator
from airflow_provider_dstack.sensors import DstackRunSensor
from airflow_provider_dstack.services import DstackServiceOperator, DstackStopRunOperator
from dstack_core import GPU, Resources, Service, Task

{head}

with DAG({dag_id!r}) as dag:
{body}
"""


def connection_json(server: LocalServer | RealServer) -> str:
    """Return the connection to ``server`` as Airflow reads it from the environment."""
    return json.dumps(
        {"conn_type": "dstack", "host": server.url, "login": server.project, "password": server.token}
    )


def wait_for(
    what: str, condition: Callable[[], T | None], seconds: float = 90.0, look_every: float = 0.1
) -> T:
    """Return the first true value of ``condition``; fail the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(look_every)


def poll_often(dag: Any) -> None:
    """Poll five times a second, in tasks that have the default interval of 5 s."""
    for task in dag.tasks:
        if getattr(task, "poll_interval", None) == 5.0:
            task.poll_interval = 0.2
        elif getattr(task, "is_mapped", False) and issubclass(task.operator_class, DstackRunOperator):
            task.partial_kwargs.setdefault("poll_interval", 0.2)


def paths(server: LocalServer, ending: str) -> list[str]:
    """Return the paths of the server's requests that end with ``ending``."""
    return [request.path for request in server.requests if request.path.endswith(ending)]


def client_of(server: LocalServer | RealServer) -> Client:
    """Return a client of either kind of server."""
    return Client(server_url=server.url, project_name=server.project, user_token=server.token)


def runs_of(server: LocalServer | RealServer, marker: str) -> list[Run]:
    """Return the runs whose marker starts with ``marker``, newest first."""
    with client_of(server) as client:
        return [run for run in client.runs.list(all=True) if (run.marker or "").startswith(marker)]


def over(run: Run, seconds: float = 90.0) -> Run:
    """Return the run once it has ended."""
    wait_for(f"end of run {run.name}", lambda: run.refresh().outcome(), seconds)
    return run


def json_in(output: str) -> Any:
    """Return the JSON that a command of Airflow printed; before 3.3 log lines may stand before it."""
    return json.loads(output.splitlines()[-1])


def lines_in(output: str, start: str) -> list[str]:
    """Return the relayed lines that contain ``start``, from there on: Airflow's log adds text around them."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    found = (re.search(rf"{start}.*?(?=\s+\[[\w.]+\]|\s+loc=|$)", line) for line in plain.splitlines())
    return [one.group() for one in found if one]


@dataclass(frozen=True)
class Ended:
    """The end of a DAG run of ``dag.test()``; ``result`` is the task's XCom."""

    state: str
    task_state: str
    result: Any
    marker: str


@dataclass(frozen=True)
class Ran:
    """The end of a DAG run of several tasks: states and XComs by task id, mapped tasks left out."""

    dag_id: str
    state: str
    tasks: dict[str, str]
    values: dict[str, Any]


class DagRunner:
    """A runner of DAG files in this process; by default a file has one task called ``train``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dag(self, arguments: str) -> Any:
        """Return the DAG whose operator has these arguments (Python source)."""
        dag_id = f"dag_{next(_NUMBERS)}"
        return self.load(textwrap.dedent(_DAG).format(dag_id=dag_id, arguments=arguments), dag_id)

    def load(self, source: str, name: str = "") -> Any:
        """Return the object called ``dag`` of a DAG file with this source."""
        name = name or f"file_{next(_NUMBERS)}"
        path = self.folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.dag

    def run(self, arguments: str) -> Ended:
        """Run a DAG with such an operator until it ends."""
        dag = self.dag(arguments)
        try:
            run = dag.test()
            ti = run.get_task_instances()[0]
            result = ti.xcom_pull(task_ids="train")
            return Ended(str(run.state), str(ti.state), result, f"airflow:{dag.dag_id}/")
        finally:
            Path(dag.fileloc).unlink()

    def run_tasks(self, body: str, head: str = "") -> Ran:
        """Run a DAG whose tasks ``body`` (Python source) defines, until it ends."""
        dag_id = f"dag_{next(_NUMBERS)}"
        source = _TASKS.format(dag_id=dag_id, head=head, body=textwrap.indent(body, "    "))
        dag = self.load(source, dag_id)
        try:
            run = dag.test()
            tasks = [ti for ti in run.get_task_instances() if ti.map_index < 0]
            return Ran(
                dag_id,
                str(run.state),
                {ti.task_id: str(ti.state) for ti in tasks},
                {ti.task_id: ti.xcom_pull(task_ids=ti.task_id) for ti in tasks},
            )
        finally:
            Path(dag.fileloc).unlink()
