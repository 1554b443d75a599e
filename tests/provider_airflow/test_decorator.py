"""``@task.dstack``: the body of a function runs in a run, and its value comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import requests

from airflow_provider_dstack import operators
from airflow_provider_dstack._compat import trigger_has_on_kill
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, Ran, paths, runs_of

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])

# The Python of the tests, which has cloudpickle; the embedded server's runs find another one first.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OWN_PYTHON = f"commands=['export PATH={Path(sys.executable).parent}:$PATH']"


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


def run(dag_runner: DagRunner, body: str) -> Ran:
    """Run a DAG with this body."""
    return dag_runner.run_tasks(body, head="LIMIT = 40")


@MODES
def test_a_function_runs_and_its_value_is_the_xcom(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ran = run(
        dag_runner,
        f"""
@task.dstack(resources=Resources(gpu=GPU(count=1)), env={{"FACTOR": "3"}}, poll_interval=0.3,
             deferrable={deferrable})
def train(rate: float, words: list[str], day: str, ds: str | None = None) -> dict[str, Any]:
    import os, time
    for step in range(1, 6):
        print(f"step-{{step}}")
        time.sleep({0.6 if deferrable else 0.05})
    print("no line end", end="")
    return {{"rate": rate * int(os.environ["FACTOR"]), "words": words, "day": day, "same": day == ds}}

@task
def use(result):
    return result["rate"] + 1

use(train(0.5, ["a", "\u00fc"], day="{{{{ ds }}}}"))
""",
    )
    output = capfd.readouterr().out
    assert ran.state == "success", output
    value = ran.values["train"]
    assert (value["rate"], value["words"], value["same"]) == (1.5, ["a", "\u00fc"], True)
    assert ran.values["use"] == 2.5
    assert [word for word in output.split() if word.startswith("step-")] == [f"step-{n}" for n in range(1, 6)]
    assert "no line end" in output
    assert "::dstack" not in output
    assert ("Pausing task as DEFERRED" in output) is deferrable
    assert len(paths(server, "/runs/apply")) == 1


@MODES
@pytest.mark.parametrize("get_logs", [True, False], ids=["with-logs", "without-logs"])
def test_a_function_that_raises_fails_the_task_with_its_traceback(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    deferrable: bool,
    get_logs: bool,
) -> None:
    ran = run(
        dag_runner,
        f"""
@task.dstack(poll_interval=0.3, deferrable={deferrable}, get_logs={get_logs})
def train():
    import time
    time.sleep({2.5 if deferrable else 0})
    raise KeyError("no such weight")

train()
""",
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "DstackRunFailed" in output
    assert "train raised an exception in run " in output
    assert 'raise KeyError("no such weight")' in output
    assert "KeyError: 'no such weight'" in output
    assert "main.py" not in output


@pytest.mark.parametrize(
    ("options", "signature", "statement", "call", "told"),
    [
        (
            "",
            "value",
            "return value",
            "object()",
            "argument 'value': expected a value that JSON can carry, got object",
        ),
        ("", "value", "return value", "{1: 'a'}", "argument 'value': expected str keys, got 1"),
        (
            "",
            "ti",
            "return 1",
            "",
            "train: expected parameters for keys of Airflow's context that JSON can carry, got ti, dag_run.",
        ),
        (
            "configuration={'type': 'service', 'port': 80}, ",
            "",
            "return 1",
            "",
            "expected a task, got a service",
        ),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_submitted(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    options: str,
    signature: str,
    statement: str,
    call: str,
    told: str,
) -> None:
    given = f"value={call}" if call else ""
    parameter = "ti=None, dag_run=None, run_id=None" if signature == "ti" else signature
    # Before 3.3, Airflow itself fails at a key that JSON does not know, before the operator starts.
    fails_earlier = "1:" in call and not trigger_has_on_kill()
    retries = 0 if fails_earlier else 2
    ran = run(
        dag_runner,
        f"@task.dstack({options}poll_interval=0.3, retries={retries})\ndef train({parameter}):\n    {statement}\n"
        f"train({given})\n",
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert ("AirflowFailException" in output) is not fails_earlier
    assert (told in output) is not fails_earlier
    assert paths(server, "/runs/apply") == []


@pytest.mark.parametrize(
    ("options", "statement", "told"),
    [
        ("", "return {1, 2}", "train: the result: expected a value that JSON can carry, got set"),
        ("", "return {'a': [b'x']}", "the result['a'][0]: expected a value that JSON can carry, got bytes"),
        (
            "max_result_bytes=100, ",
            "return 'x' * 99",
            "the result: expected at most 100 bytes (max_result_bytes), got 101",
        ),
        ("env={'PATH': '/nowhere'}, ", "return 1", "train: expected python3 in the run, got none"),
        (
            f"serializer='cloudpickle', {OWN_PYTHON}, ",
            "return (item for item in [1])",
            "the result: expected what can be pickled",
        ),
    ],
)
def test_a_call_that_can_never_work_is_not_retried(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    options: str,
    statement: str,
    told: str,
) -> None:
    ran = run(
        dag_runner,
        f"@task.dstack({options}poll_interval=0.3, retries=2, retry_delay=timedelta(0))\n"
        f"def train():\n    {statement}\ntrain()\n",
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "AirflowFailException" in output
    assert told in output
    assert len(runs_of(server, f"airflow:{ran.dag_id}/")) == 1


def test_a_missing_cloudpickle_is_reported(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cloudpickle.py").write_text("raise ImportError")
    options = f"serializer='cloudpickle', {OWN_PYTHON}, env={{'PYTHONPATH': {str(tmp_path)!r}}}"
    ran = run(dag_runner, f"@task.dstack({options}, poll_interval=0.3)\ndef train(): ...\ntrain()")
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert f"expected the package cloudpickle in the run, and its Python {PYTHON} has none" in output


def test_arguments_are_neither_in_the_run_nor_in_a_process_list(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = run(
        dag_runner,
        """
@task.dstack(poll_interval=0.3)
def train(secret):
    import os, pathlib, subprocess
    here = pathlib.Path.home() / ".dstack" / "function"
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    return {"listed": secret in listed, "files": sorted(path.name for path in here.iterdir())}

train("swordfish-4711")
""",
    )
    assert ran.values["train"] == {"listed": False, "files": [".dstackignore", "main.py", "source"]}
    (run_,) = runs_of(server, f"airflow:{ran.dag_id}/")
    # The whole run, as any member of the project may see it.
    reply = requests.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        json={"run_name": run_.name},
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=10,
    )
    assert run_.name in reply.text
    assert "swordfish-4711" not in reply.text


def test_a_task_is_mapped_over_another_ones_result(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = run(
        dag_runner,
        """
@task
def rates():
    return [1, 2, 3]

@task.dstack(poll_interval=0.3, resources={"memory": "1GB"})
def train(rate, factor):
    return rate * factor

@task.dstack(poll_interval=0.3)
def best(values):
    return max(values)

best(train.partial(factor=10).expand(rate=rates()))
""",
    )
    assert ran.state == "success"
    assert ran.values["best"] == 30


def test_cloudpickle_takes_what_the_function_refers_to(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = run(
        dag_runner,
        f"""
def helper(value):
    return value + LIMIT

@task.dstack(poll_interval=0.3, serializer="cloudpickle", {OWN_PYTHON})
def train(pair):
    return [helper(pair[0]), type(pair).__name__]

train((2, 3))
""",
    )
    assert ran.state == "success"
    assert ran.values["train"] == [42, "tuple"]


def test_a_yaml_configuration_is_added_to(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    (dag_runner.folder / "gpu.dstack.yml").write_text(
        "type: task\nenv:\n  ONE: uno\ncommands:\n  - echo prepared by {{ task.task_id }}\n"
    )
    ran = run(
        dag_runner,
        """
@task.dstack(configuration="gpu.dstack.yml", env={"TWO": "2"}, poll_interval=0.3)
def train(name):
    import os
    return [os.environ["ONE"], os.environ["TWO"], name]

train("conf.yml")
""",
    )
    output = capfd.readouterr().out
    assert ran.values["train"] == ["uno", "2", "conf.yml"], output
    assert "prepared by train" in output


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "@task.dstack(serializer='yaml')\ndef train(): ...\ntrain()",
            "serializer: expected one of 'json', 'cloudpickle', got 'yaml'",
        ),
        (
            "@task.dstack(max_result_bytes=0)\ndef train(): ...\ntrain()",
            "max_result_bytes: expected 1 byte or more, got 0",
        ),
        (
            "@task.dstack(resources={}, run_resources={})\ndef train(): ...\ntrain()",
            "expected resources or run_resources",
        ),
    ],
)
def test_wrong_parameters_are_reported_when_the_dag_is_parsed(
    dag_runner: DagRunner, source: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        run(dag_runner, source)
