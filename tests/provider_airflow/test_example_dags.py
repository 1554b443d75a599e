"""The DAGs in ``dags/`` are parsed and run as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack import operators
from dstack_core.local import LocalServer
from tests.provider_airflow.support import BOTH_WAYS, DagRunner, poll_often, runs_of
from tests.provider_airflow.versions import DagBag

DAGS = Path(__file__).parents[2] / "dags"
FILES = sorted(DAGS.glob("example_*.py"))


def test_every_kind_of_task_has_an_example() -> None:
    assert [path.stem.removeprefix("example_dstack_") for path in FILES] == [
        "batch_inference",
        "fine_tune",
        "fleet",
        "function",
        "reap",
        "run",
        "secrets",
        "service",
        "spot",
        "sweep",
        "train",
        "yaml",
    ]


@BOTH_WAYS
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_parsed_and_runs(
    path: Path,
    how: dict[str, Any],
    dag_runner: DagRunner,
    server: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert DagBag(dag_folder=str(path), bundle_path=DAGS).import_errors == {}
    # dag.test() has no race between a quick trigger and the scheduler.
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    for beside in DAGS.glob("*.yml"):
        shutil.copy(beside, dag_runner.folder)
    dag = dag_runner.load(path.read_text(), path.stem)
    assert dag.dag_id == path.stem
    assert dag.doc_md
    poll_often(dag)
    try:
        run = dag.test(**how)
    finally:
        Path(dag.fileloc).unlink()
    tasks = {
        (ti.task_id, ti.map_index): (ti.state, ti.xcom_pull(task_ids=ti.task_id, map_indexes=ti.map_index))
        for ti in run.get_task_instances()
    }
    assert {state for state, _ in tasks.values()} == {"success"}, tasks
    if path.stem == "example_dstack_reap":
        assert tasks["reap", -1][1] == []
        return
    runs = runs_of(server, f"airflow:{dag.dag_id}/")
    assert runs
    assert [one.name for one in runs if one.outcome() is None] == []
    if path.stem == "example_dstack_fleet":
        assert list(tasks["gpus.delete_fleet", -1][1].values()) == ["deleted"]
    if path.stem == "example_dstack_secrets":
        (name,) = tasks["secrets.delete_secrets", -1][1]
        assert runs[0].env == {"HF_TOKEN": f"${{{{ secrets.{name} }}}}"}
        assert b"a token of 10 characters" in b"".join(runs[0].logs())
    if path.stem == "example_dstack_service":
        assert tasks["ask", 0][1] == "echo: What is a GPU?"
        assert tasks["stop", -1][1] == {runs[0].name: "terminated"}
    if path.stem == "example_dstack_batch_inference":
        assert tasks["predict", -1][1]["result"] == {"rows": 5000}
    if path.stem == "example_dstack_fine_tune":
        assert tasks["register", -1][1] == "s3://models/tiny/4.pt has a loss of 0.135"
    if path.stem == "example_dstack_spot":
        assert tasks["report", -1][1] == ["attempt 1: done_by_runner"]
    if path.stem == "example_dstack_function":
        assert tasks["best", -1][1] == 0.05
        assert len(runs) == 3
