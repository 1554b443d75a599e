"""Secrets show up nowhere: not in the log, the rendered fields, an error, an XCom."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_dstack import operators
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
WORD, PASSWORD = "open-sesame-77", "docker-pass-44"
_DAG = """
train = DstackRunOperator(
    task_id="train",
    configuration={{
        "type": "task",
        "image": "registry.example.com/train",
        "registry_auth": {{"username": "robot", "password": "{{{{ 'docker-pass' }}}}-44"}},
        "env": {{"WORD_TOKEN": "{{{{ 'open-sesame' }}}}-77", "STEPS": "100000"}},
        "commands": ["{pause}", 'echo "it is $WORD_TOKEN after $STEPS, $(cat {{path}})"', "exit 3"],
    }},
    poll_interval=0.3,
    deferrable={deferrable},
)
"""


def kept(dag_id: str) -> list[str]:
    """Return what Airflow's database holds of a DAG's tasks: rendered fields and XComs."""
    with create_session() as session:
        rows: list[Any] = [
            *session.scalars(
                select(RenderedTaskInstanceFields.rendered_fields).where(
                    RenderedTaskInstanceFields.dag_id == dag_id
                )
            ),
            *session.scalars(select(XComModel.value).where(XComModel.dag_id == dag_id)),
        ]
    return [str(row) for row in rows]


@MODES
def test_secrets_are_in_no_log_field_error_or_xcom(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    deferrable: bool,
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    pause = "sleep 3" if deferrable else "true"
    (tmp_path / "token").write_text(server.token)
    ran = dag_runner.run_tasks(
        _DAG.format(pause=pause, deferrable=deferrable).replace("{path}", str(tmp_path / "token"))
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "it is *** after 100000, ***" in output
    found = kept(ran.dag_id)
    assert any("registry.example.com/train" in row for row in found)
    assert any("dstack_run_name" in row or "-train-" in row for row in found)
    for secret in (WORD, PASSWORD, server.token):
        assert secret not in output
        assert not [row for row in found if secret in row]


@MODES
def test_secrets_of_a_function_are_hidden_too(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(env={{"WORD_TOKEN": "{{{{ 'open-sesame' }}}}-77"}}, image="i",
             registry_auth={{"username": "u", "password": "docker-pass-44"}},
             poll_interval=0.3, deferrable={deferrable})
def train():
    import os, time
    time.sleep({3 if deferrable else 0})
    print("it is", os.environ["WORD_TOKEN"])
    raise ValueError(os.environ["WORD_TOKEN"])

train()
"""
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "it is ***" in output
    assert "ValueError: ***" in output
    for secret in (WORD, PASSWORD):
        assert secret not in output
        assert not [row for row in kept(ran.dag_id) if secret in row]


def test_secrets_of_mapped_tasks_are_hidden_too(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(
        """
tries = [
    {"type": "task", "commands": ["echo it is $WORD_TOKEN"], "env": {"WORD_TOKEN": f"{{{{ 'mapped' }}}}-sesame-{number}"}}
    for number in (1, 2)
]
DstackRunOperator.partial(task_id="train", poll_interval=0.3).expand(configuration=tries)
"""
    )
    output = capfd.readouterr().out
    assert ran.state == "success"
    assert output.count("it is ***") == 2
    assert "mapped-sesame" not in output
    assert len([row for row in kept(ran.dag_id) if "echo it is" in row]) == 2
    assert not [row for row in kept(ran.dag_id) if "mapped-sesame" in row]


def test_a_template_that_fails_shows_no_secret(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(
        """
what = {"type": "task", "commands": ["{{ nothing.at_all }}"], "env": {"WORD_TOKEN": "literal-sesame-99"}}
DstackRunOperator(task_id="train", configuration=what)
"""
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "'nothing' is undefined" in output
    assert "literal-sesame-99" not in output


@MODES
def test_secrets_are_in_no_process_list(
    dag_runner: DagRunner, server: LocalServer, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error):
                    seen.add(" ".join(process.cmdline()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        ran = dag_runner.run_tasks(
            _DAG.format(pause="sleep 2", deferrable=deferrable).replace("{path}", "/dev/null")
        )
    finally:
        over.set()
        watcher.join()
    assert ran.tasks == {"train": "failed"}
    assert any("sleep 2" in line for line in seen)
    for secret in (WORD, PASSWORD, server.token):
        assert not [line for line in seen if secret in line]
