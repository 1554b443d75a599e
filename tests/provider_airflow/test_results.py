"""What a run reports as its result is the task's XCom, in both modes; or the task is skipped, or fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from airflow.models.asset import AssetEvent
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_dstack import operators
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths, runs_of

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
RESULT = {"accuracy": 0.93, "names": ["ä", "b"]}


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer without the pause that avoids a race with the scheduler; ``dag.test()`` has no such race."""
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


def message(kind: str, **fields: Any) -> str:
    return f"echo '::dstack::{json.dumps({'kind': kind, **fields})}'"


def writing(value: Any) -> str:
    return f"echo '{json.dumps(value)}' > $DSTACK_RESULT_FILE"


def arguments(deferrable: bool, *commands: str, **more: Any) -> str:
    """Return the operator's arguments; a deferrable task reports something before it is handed over."""
    waiting = ["sleep 3"] if deferrable else []
    options = "".join(f", {name}={value!r}" for name, value in more.items())
    return (
        f"configuration=Task(commands={[commands[0], *waiting, *commands[1:]]!r}), poll_interval=0.3, "
        f"deferrable={deferrable}{options}"
    )


@MODES
def test_the_outcome_has_the_result_and_the_metrics(
    dag_runner: DagRunner, server: LocalServer, deferrable: bool
) -> None:
    ended = dag_runner.run(
        arguments(
            deferrable,
            message("metric", step=1, loss=0.5),
            message("metric", step=2, loss=0.25, lr=1),
            writing(RESULT),
        )
    )
    assert ended.task_state == "success"
    assert ended.result["status"] == "done"
    assert (ended.result["has_result"], ended.result["result"]) == (True, RESULT)
    assert ended.result["metrics"] == {"loss": 0.25, "lr": 1.0}


@MODES
def test_the_result_can_be_what_the_task_returns(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(arguments(deferrable, "echo started", writing(RESULT), returns="result"))
    assert (ended.task_state, ended.result) == ("success", RESULT)
    assert ("Pausing task as DEFERRED" in capfd.readouterr().out) is deferrable


def test_a_result_is_found_in_a_log_that_is_not_shown(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run(
        arguments(False, "echo not-shown", writing([1, 2]), returns="result", log_budget_bytes=0)
    )
    assert (ended.task_state, ended.result) == ("success", [1, 2])
    assert "not-shown" not in capfd.readouterr().out.replace("echo not-shown", "")


@MODES
@pytest.mark.parametrize("reports", [True, False])
def test_a_run_without_a_result_fails_a_task_that_returns_it(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    deferrable: bool,
    reports: bool,
) -> None:
    ended = dag_runner.run(arguments(deferrable, "echo done", returns="result", reports=reports))
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "DstackError" in output
    assert ("got none. Set reports=True, and write JSON to $DSTACK_RESULT_FILE" in output) is not reports
    assert ("got none. Write JSON to $DSTACK_RESULT_FILE" in output) is reports


def test_a_run_without_a_result_succeeds_with_its_outcome(dag_runner: DagRunner, server: LocalServer) -> None:
    ended = dag_runner.run(arguments(False, "echo done"))
    assert ended.task_state == "success"
    assert (ended.result["has_result"], ended.result["result"]) == (False, None)


@MODES
def test_a_failed_command_has_no_result(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(arguments(deferrable, "echo started", writing(RESULT), "exit 3", returns="result"))
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "DstackUserError" in output
    assert "exited with status 3" in output
    assert "expected a result" not in output


@MODES
def test_a_run_can_skip_its_task(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        arguments(deferrable, message("skip", reason="no new data today"), "true", returns="result")
    )
    assert ended.task_state == "skipped"
    output = capfd.readouterr().out
    assert "Nothing to do: no new data today. The task is skipped if the run succeeds." in output
    assert "asks to skip the task: no new data today" in output


def test_a_failed_run_skips_nothing(dag_runner: DagRunner, server: LocalServer) -> None:
    ended = dag_runner.run(arguments(False, message("skip", reason="no new data"), "exit 1"))
    assert ended.task_state == "failed"


def test_reports_can_be_switched_off(dag_runner: DagRunner, server: LocalServer) -> None:
    ended = dag_runner.run(arguments(False, 'echo "file: $DSTACK_RESULT_FILE"', reports=False))
    assert ended.task_state == "success"
    (run,) = runs_of(server, ended.marker)
    assert b"".join(run.logs()).strip() == b"file:"
    assert paths(server, "/files/upload_archive") == []


@MODES
def test_reports_are_xcoms_of_the_task(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    link = {"url": "https://wandb.example/r/1", "text": "W&B"}
    dag = dag_runner.dag(
        arguments(
            deferrable,
            message("link", **link),
            message("metric", step=7, loss=0.5),
            message("table", name="eval", columns=["a", "b"], rows=[[1, 2]]),
            message("progress", done=1, total=4, text="epoch 1"),
            message("image", name="plot", png="iVBORw0KGgo="),
            message("image", name="plot", png="iVBORw0KGgo="),
            message("checkpoint", path="s3://models/7.pt", step=7),
        )
    )
    try:
        run = dag.test()
    finally:
        Path(dag.fileloc).unlink()
    (ti,) = run.get_task_instances()
    assert ti.state == "success"
    found = {
        name: ti.xcom_pull(task_ids="train", key=f"dstack_{name}")
        for name in ("metrics", "links", "tables", "checkpoint", "assets")
    }
    assert found == {
        "metrics": {"loss": {"value": 0.5, "step": 7}},
        "links": [link],
        "tables": {"eval": {"columns": ["a", "b"], "rows": [[1, 2]]}},
        "checkpoint": {"path": "s3://models/7.pt", "step": 7},
        "assets": None,
    }
    output = capfd.readouterr().out
    assert output.count("Progress: 25 %, 1 of 4 (epoch 1)") == 1
    assert output.count("The run reported an image, which Airflow does not show.") == 1


@MODES
def test_an_asset_event_names_the_run_that_made_it(
    dag_runner: DagRunner, server: LocalServer, deferrable: bool
) -> None:
    uri = f"s3://bucket/predictions-{deferrable}"
    dag_id = f"assets_{deferrable}"
    commands = [
        message("asset", uri=uri, metadata={"rows": 12}),
        *(["sleep 3"] if deferrable else []),
        message("asset", uri="s3://bucket/other", metadata={"rows": 1}),
        message("metric", loss=0.5),
        writing({"rows": 12}),
    ]
    dag = dag_runner.load(
        "from airflow.sdk import DAG, Asset\n"
        "from airflow_provider_dstack.operators import DstackRunOperator\n"
        f"with DAG({dag_id!r}) as dag:\n"
        f"    DstackRunOperator(task_id='train', poll_interval=0.3, deferrable={deferrable},\n"
        f"        configuration={{'type': 'task', 'commands': {commands!r}}}, outlets=[Asset({uri!r})])\n",
        dag_id,
    )
    try:
        run = dag.test()
    finally:
        Path(dag.fileloc).unlink()
    assert str(run.state) == "success"
    (own,) = runs_of(server, f"airflow:{dag_id}/")
    with create_session() as session:
        events = session.scalars(select(AssetEvent).where(AssetEvent.source_dag_id == dag_id)).all()
        (extra,) = [event.extra for event in events]
    assert extra == {
        "run_name": own.name,
        "url": own.url,
        "metrics": {"loss": 0.5},
        "result": {"rows": 12},
        "metadata": {"rows": 12},
    }


@MODES
@pytest.mark.parametrize("returns", ["outcome", "result"])
def test_secrets_in_a_result_are_replaced(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    deferrable: bool,
    returns: str,
) -> None:
    command = """echo '{"word": "'$WORD_TOKEN'", "kept": 1}' > $DSTACK_RESULT_FILE"""
    ended = dag_runner.run(
        arguments(deferrable, "true", command, env={"WORD_TOKEN": "open-sesame-77"}, returns=returns)
    )
    result = ended.result if returns == "result" else ended.result["result"]
    assert result == {"word": "***", "kept": 1}
    shown = "".join(capfd.readouterr())
    assert "they are replaced by ***" in shown
    assert "open-sesame-77" not in shown
