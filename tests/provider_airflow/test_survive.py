"""``survive``: interruptions at several moments use no try of the task, and each line is relayed once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from airflow_provider_dstack import operators
from airflow_provider_dstack._parameters import in_words_of_operator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner

# 1.2 s with lines, then 1 s without.
WORK = "for i in 1 2 3 4; do echo step-$i; sleep 0.3; done; sleep 1"


@pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
def test_a_task_survives_interruptions_within_its_try(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)
    # Before the first line, amid the lines, after the last.
    for seconds in (0, 0.7, 1.7):
        server.scenarios.interrupt_after(seconds, noticed_after=0)
    ended = dag_runner.run(
        f"configuration=Task(commands=[{WORK!r}]), spot_policy='spot', survive='1h', poll_interval=0.3, "
        f"deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "success"
    assert ("Pausing task as DEFERRED" in output) is deferrable
    (run,) = server.runs
    assert run.job_reasons == (*["interrupted_by_no_capacity"] * 3, "done_by_runner")
    assert re.search(r"/1of1#[0-9a-f]{6}$", run.marker)
    assert re.findall(r"step-\d", output) == list(run.log)
    assert run.log[-4:] == ("step-1", "step-2", "step-3", "step-4")
    assert output.count("[attempt 4] step-1") == 1
    assert [one["number"] for one in ended.result["attempts"]] == [1, 2, 3, 4]
    assert run.finished


def test_an_attempt_continues_from_the_checkpoint_of_the_one_before(
    dag_runner: DagRunner, server: LocalServer
) -> None:
    with server.client() as client:
        client.volumes.apply({"name": "data", "backend": "aws", "region": "us-east-1", "size": "10GB"})
        client.volumes.wait("data", timeout=60)
    server.scenarios.interrupt_after(0.7, noticed_after=0)
    work = (
        'mkdir -p "$DSTACK_CHECKPOINT"; cd "$DSTACK_CHECKPOINT"; echo ran >> tries; sleep 1.5; wc -l < tries'
    )
    ended = dag_runner.run(
        f"configuration=Task(commands=[{work!r}], volumes=['data:/data']), spot_policy='spot', "
        "survive={'duration': '1h', 'checkpoint': '/data/{{ task.task_id }}'}, poll_interval=0.3"
    )
    assert ended.task_state == "success"
    (run,) = server.runs
    assert run.log[-1].strip() == "2"
    marked = re.fullmatch(r"airflow:(.+)/1of1#[0-9a-f]{6}", run.marker)
    assert marked is not None
    task_id = marked[1].rpartition("/")[2]
    assert run.configuration["env"]["DSTACK_CHECKPOINT"].startswith(f"/data/{task_id}/")


def test_the_limit_fails_the_task_as_interrupted(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.scenarios.interrupt_after(0.2, times=9, noticed_after=0)
    ended = dag_runner.run(
        f"configuration=Task(commands=[{WORK!r}]), spot_policy='spot', survive={{'times': 1}}, "
        "poll_interval=0.3"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "DstackSpotInterrupted" in output
    assert "survive allows 1 of them" in output
    assert [run.finished for run in server.runs] == [True]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("soon", "survive.duration: expected seconds above 0"),
        ({"times": 0}, "survive.times: expected a whole number of 1 or more"),
        ([4], "survive: expected a Survive, a duration"),
    ],
)
def test_a_wrong_survive_is_an_error_when_the_dag_is_parsed(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        operators.DstackRunOperator(task_id="train", configuration={"type": "task"}, survive=given)
    for later in ("{{ params.survive }}", {"duration": "{{ params.hours }}h"}, 3600, "4h", True):
        operators.DstackRunOperator(task_id="train", configuration={"type": "task"}, survive=later)


def test_the_retry_policy_has_the_name_that_the_operator_gives_it() -> None:
    assert in_words_of_operator("survive: expected no retry_policy with it, got both.") == (
        "survive: expected no run_retry_policy with it, got both."
    )
    assert in_words_of_operator("max_cost: ask for other resources.") == "max_cost: ask for other resources."
