"""On a real dstack server: a service as setup and teardown, and sensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack_core import Run
from tests.ports import free_port
from tests.provider_airflow.support import DagRunner, client_of, over, runs_of, wait_for
from tests.rig.server import RealServer

pytestmark = pytest.mark.real

_DAG = """
serve = DstackServiceOperator(
    task_id="serve",
    configuration=Service(port={port}, commands=[
        "mkdir -p site && cd site", "echo hello > greeting",
        "exec python3 -u -m http.server {port} --bind 127.0.0.1"]),
    poll_interval=0.5,
)
stop = DstackStopRunOperator(task_id="stop", runs_of=serve, poll_interval=0.5)

@task
def ask(url):
    import requests
    from airflow_provider_dstack.hooks import DstackHook

    reply = requests.get(url + "{path}", headers=DstackHook().headers(), timeout=30)
    reply.raise_for_status()
    return reply.text

ask(serve.output) >> stop.as_teardown(setups=serve)
"""


@pytest.mark.parametrize(("path", "state"), [("greeting", "success"), ("missing", "failed")])
def test_a_service_on_a_real_server_answers_and_is_stopped(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], path: str, state: str
) -> None:
    ran = dag_runner.run_tasks(_DAG.format(port=free_port(), path=path))
    output = capfd.readouterr().out
    assert ran.tasks == {"serve": "success", "ask": state, "stop": "success"}, output
    (run,) = runs_of(real, f"airflow:{ran.dag_id}/")
    assert ran.values["serve"] == run.service_url == f"{real.url}/proxy/services/main/{run.name}/"
    assert ran.values["ask"] == ("hello\n" if state == "success" else None)
    assert ran.values["stop"] == {run.name: "terminated"}
    assert run.raw_status == "terminated"
    assert f"Service {run.name} answers at {run.service_url}" in output


@contextmanager
def run_elsewhere(real: RealServer, name: str, command: str) -> Iterator[Run]:
    """Submit what the sensor waits for, as another user would; stop it in the end."""
    with client_of(real) as client:
        run = client.runs.submit({"type": "task", "commands": [command]}, run_name=name)
        try:
            yield run
        finally:
            run.stop()
            over(run)


def in_background(condition: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    def work() -> None:
        wait_for("moment to act", condition, 120)
        action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["mode='poke'", "deferrable=True"], ids=["poke", "deferrable"])
def test_a_sensor_sees_a_run_on_a_real_server(
    dag_runner: DagRunner,
    real: RealServer,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    how: str,
) -> None:
    gate = tmp_path / "gate"
    command = f"until [ -e {gate} ]; do sleep 0.2; done"
    with run_elsewhere(real, "elsewhere", command) as run:
        # Opened only once the run is seen running, so that the sensor has something to wait for.
        opener = in_background(lambda: run.refresh().raw_status == "running", gate.touch)
        ran = dag_runner.run_tasks(
            "up = DstackRunSensor(task_id='up', run_name='elsewhere', statuses=['running', 'done'], "
            f"poke_interval=0.5, timeout=120, {how})\n"
            "end = DstackRunSensor(task_id='end', run_name='elsewhere', "
            f"poke_interval=0.5, timeout=120, {how})\n"
            "up >> end"
        )
        opener.join()
        output = capfd.readouterr().out
        assert ran.tasks == {"up": "success", "end": "success"}, output
        outcome = run.refresh().outcome()
        assert outcome is not None
        assert ran.values["up"]["status"] in ("running", "done")
        assert ran.values["end"] == {
            "run_name": "elsewhere",
            "status": "done",
            "url": run.url,
            "outcome": outcome.to_dict(),
        }


@pytest.mark.parametrize("how", ["mode='poke'", "deferrable=True"], ids=["poke", "deferrable"])
def test_a_sensor_fails_with_its_run_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    with run_elsewhere(real, "fails-elsewhere", "sleep 3; exit 7"):
        ran = dag_runner.run_tasks(
            "DstackRunSensor(task_id='wait', run_name='fails-elsewhere', poke_interval=0.5, "
            f"timeout=120, {how})"
        )
    output = capfd.readouterr().out
    assert ran.tasks == {"wait": "failed"}
    assert "DstackUserError" in output
    assert "exited with status 7" in output
