"""``@task.dstack`` on a real dstack server: the value comes back, and so does an exception."""

from __future__ import annotations

import pytest

from tests.provider_airflow.support import DagRunner, lines_in, runs_of
from tests.rig.server import RealServer

pytestmark = pytest.mark.real


@pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
def test_a_function_on_a_real_server_gives_its_value_back(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(poll_interval=0.5, env={{"FACTOR": "3"}}, deferrable={deferrable})
def train(rate, words):
    import os, time
    for step in range(3):
        print(f"step-{{step}}", flush=True)
        time.sleep({3 if deferrable else 0.1})
    return {{"rate": rate * int(os.environ["FACTOR"]), "words": words, "big": "x" * 50_000}}

@task
def use(result):
    return result["rate"] + 1

use(train(0.5, ["a", "\u00fc"]))
"""
    )
    output = capfd.readouterr().out
    assert ran.state == "success", output
    assert ran.values["train"] == {"rate": 1.5, "words": ["a", "\u00fc"], "big": "x" * 50_000}
    assert ran.values["use"] == 2.5
    assert lines_in(output, "step-") == ["step-0", "step-1", "step-2"]
    assert "::dstack" not in output
    (run,) = runs_of(real, f"airflow:{ran.dag_id}/")
    assert run.raw_status == "done"


def test_an_exception_in_a_function_on_a_real_server_is_reported(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(
        """
@task.dstack(poll_interval=0.5)
def train():
    raise KeyError("no such weight")

train()
"""
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "DstackRunFailed" in output
    assert "train raised an exception in run " in output
    assert "KeyError: 'no such weight'" in output
    (run,) = runs_of(real, f"airflow:{ran.dag_id}/")
    assert run.raw_status == "failed"
