"""What a task that failed leaves for other tasks: the outcome of its run, and no empty links."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperatorLink

from airflow_provider_dstack._compat import AirflowSkipException
from airflow_provider_dstack._outcome import finished_event
from airflow_provider_dstack.decorators import dstack_task
from airflow_provider_dstack.errors import DstackRunError, DstackRunFailed, DstackUserError
from airflow_provider_dstack.links import OUTCOME_KEY, RUN_LINKS, DstackRunLink, leave_pushed
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.sensors import DstackRunSensor
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner
from tests.provider_airflow.test_outcome import FAILED

# The outcome of a failed run as another task of the DAG run reads it.
READER = """
def read(ti):
    found = ti.xcom_pull(task_ids="train", key="dstack_outcome")
    return {name: found[name] for name in ("category", "exit_status", "status")}

train >> PythonOperator(task_id="read", python_callable=read, trigger_rule="all_done")
"""
HEAD = "from airflow.providers.standard.operators.python import PythonOperator"


class Pushes(dict[str, Any]):
    """The context of one try, and what it pushed."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}
        ti = SimpleNamespace(
            dag_id="d", run_id="r", task_id="train", try_number=1, max_tries=0, map_index=-1, id="1"
        )
        ti.xcom_push = lambda key, value: self.pushed.update({key: json.loads(json.dumps(value))})
        super().__init__(ti=ti)


def by_operator(*commands: str, **arguments: Any) -> DstackRunOperator:
    return DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": list(commands)},
        poll_interval=0.1,
        **arguments,
    )


def by_service(*commands: str, **arguments: Any) -> DstackRunOperator:
    configuration = {"type": "service", "port": 80, "auth": False, "commands": list(commands)}
    return DstackServiceOperator(task_id="train", configuration=configuration, poll_interval=0.1, **arguments)


@pytest.fixture
def context() -> Any:
    return Pushes()


@pytest.mark.parametrize("way", [by_operator, by_service], ids=lambda way: way.__name__)
def test_a_task_that_failed_has_the_outcome_of_its_run(
    server: LocalServer, context: Any, way: Callable[..., DstackRunOperator]
) -> None:
    with pytest.raises(DstackUserError) as caught:
        way("exit 127").execute(context)
    outcome = context.pushed[OUTCOME_KEY]
    assert outcome == json.loads(json.dumps(caught.value.outcome))
    assert (outcome["category"], outcome["exit_status"]) == ("user.not_found", 127)
    assert outcome["cause"] == "A command was not found."
    assert outcome["next_step"]


def test_a_service_that_ends_before_it_answers_has_its_outcome(server: LocalServer, context: Any) -> None:
    with pytest.raises(DstackRunFailed, match="before it answered"):
        by_service("true").execute(context)
    assert context.pushed[OUTCOME_KEY]["status"] == "done"


def test_a_task_that_succeeded_has_its_outcome_as_its_result_only(server: LocalServer, context: Any) -> None:
    assert by_operator("true").execute(context)["category"] in ("", "done")
    assert OUTCOME_KEY not in context.pushed


def test_a_task_that_its_run_skips_has_the_outcome(server: LocalServer, context: Any) -> None:
    with pytest.raises(AirflowSkipException):
        by_operator("exit 99", skip_on_exit_code=99).execute(context)
    assert context.pushed[OUTCOME_KEY]["exit_status"] == 99


def test_a_function_that_raised_has_the_outcome_of_its_run(server: LocalServer, context: Any) -> None:
    @dstack_task(poll_interval=0.1)
    def train() -> None:
        raise ValueError("no data")

    with DAG("functions", schedule=None):
        task: Any = train()
    with pytest.raises(DstackRunFailed, match="no data"):
        task.operator.execute(context)
    assert context.pushed[OUTCOME_KEY]["status"] == "failed"


@pytest.mark.usefixtures("server")
def test_a_resumed_task_has_the_outcome_without_the_secrets_of_its_result(context: Any) -> None:
    task = by_operator("true", env={"HF_TOKEN": "hunter22-hunter22"})
    outcome = replace(FAILED, result={"was": "hunter22-hunter22"}, has_result=True)
    with pytest.raises(DstackRunError):
        task.execute_complete(context, finished_event(outcome, ["out of memory"]))
    assert context.pushed[OUTCOME_KEY]["exit_status"] == FAILED.exit_status
    assert context.pushed[OUTCOME_KEY]["result"] == {"was": "***"}


def test_a_sensor_has_the_outcome_of_a_run_that_failed(server: LocalServer, context: Any) -> None:
    run = server.client().runs.submit({"type": "task", "commands": ["exit 3"]}, run_name="train")
    run.wait(poll_interval=0.1)
    with pytest.raises(DstackRunError):
        DstackRunSensor(task_id="wait", run_name="train").execute(context)
    assert context.pushed[OUTCOME_KEY]["exit_status"] == 3


@pytest.mark.parametrize("deferrable", [False, True])
def test_another_task_reads_why_a_task_failed(
    dag_runner: DagRunner, server: LocalServer, deferrable: bool
) -> None:
    ran = dag_runner.run_tasks(
        f"""
train = DstackRunOperator(
    task_id="train",
    configuration={{"type": "task", "commands": ["sleep {7 if deferrable else 0}", "exit 127"]}},
    poll_interval=0.2,
    deferrable={deferrable},
)
{READER}
""",
        HEAD,
    )
    assert ran.values["read"] == {"category": "user.not_found", "exit_status": 127, "status": "failed"}


def test_a_task_that_submitted_nothing_leaves_no_links_and_no_complaints(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run("configuration={'type': 'task', 'commands': ['true']}, run_resources='A100:x'")
    output = capfd.readouterr().out
    assert (ended.task_state, ended.result) == ("failed", None)
    assert "run_resources: expected" in output
    for complaint in ("XCom not found", "Failed to push an xcom", "dstack_run_url", "dstack_logs_url"):
        assert complaint not in output


def test_links_that_the_operator_does_not_push_stay() -> None:
    class Wiki(BaseOperatorLink):
        name = "wiki"

        def get_link(self, operator: Any, *, ti_key: Any) -> str:
            return "https://wiki.example.com"

    own = Wiki()

    class WithWiki(DstackRunOperator):
        operator_extra_links = (*RUN_LINKS, own)

    task = WithWiki(task_id="train", configuration={"type": "task", "commands": ["true"]})
    leave_pushed(task)
    assert list(task.operator_extra_links) == [own]
    assert len(WithWiki.operator_extra_links) == len(RUN_LINKS) + 1
    assert any(isinstance(link, DstackRunLink) for link in DstackRunOperator.operator_extra_links)
