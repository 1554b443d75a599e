"""Services as setup, stopped as teardown."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from airflow.sdk import DAG

from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.services import DstackServiceOperator, DstackStopRunOperator
from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.support import DagRunner, paths, runs_of, wait_for
from tests.provider_airflow.test_operator import CONTEXT, TI

_SERVE = "python3 -m http.server {port} --bind 127.0.0.1"
_ASK = """
@task
def use(url):
    import requests
    return requests.get(url, headers={{"Authorization": "Bearer {token}"}}, timeout=10).status_code

{end}
"""


def service(port: int, command: str = _SERVE, **options: Any) -> str:
    """Return the source of a service operator."""
    what = {"type": "service", "port": port, "commands": [command.format(port=port)]}
    told = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"DstackServiceOperator(task_id='serve', configuration={what!r}, poll_interval=0.3{told})"


def test_a_service_answers_its_tasks_and_is_stopped(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(
        f"serve = {service(free_port())}\n"
        "stop = DstackStopRunOperator(task_id='stop', runs_of=serve, poll_interval=0.3)\n"
        + _ASK.format(token=server.token, end="use(serve.output) >> stop.as_teardown(setups=serve)")
    )
    assert ran.tasks == {"serve": "success", "use": "success", "stop": "success"}
    assert ran.values["use"] == 200
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    assert ran.values["serve"] == run.service_url
    assert ran.values["stop"] == {run.name: "terminated"}
    assert run.raw_status == "terminated"


def test_a_service_is_stopped_even_when_the_work_fails(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(
        f"serve = {service(free_port())}\n"
        "stop = DstackStopRunOperator(task_id='stop', runs_of='serve', poll_interval=0.3)\n"
        + _ASK.format(token="wrong", end="use(serve.output) >> stop.as_teardown(setups=serve)").replace(
            "return", "assert 200 =="
        )
    )
    assert ran.tasks == {"serve": "success", "use": "failed", "stop": "success"}
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    assert run.raw_status == "terminated"


def test_a_service_that_ends_before_it_answers_fails_the_task(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(
        f"serve = {service(free_port(), 'echo no weights; exit 3')}\n"
        "stop = DstackStopRunOperator(task_id='stop', runs_of=serve, trigger_rule='all_done')\n"
        "serve >> stop"
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"serve": "failed", "stop": "success"}
    assert "DstackUserError" in output
    assert "no weights" in output
    assert "No run of serve is running." in output


def test_a_service_that_ends_well_before_it_answers_fails_the_task_too(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(service(free_port(), "true"))
    assert ran.tasks == {"serve": "failed"}
    assert "before it answered" in capfd.readouterr().out


def test_a_service_that_is_too_slow_is_stopped(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(
        service(free_port(), "sleep 600").replace("poll", "execution_timeout=timedelta(seconds=3), poll")
    )
    assert ran.tasks == {"serve": "failed"}
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    wait_for("end of the service", lambda: run.refresh().outcome(), 30)
    assert run.raw_status == "terminated"


def test_an_unreachable_server_is_tolerated_while_a_service_starts(
    dag_runner: DagRunner, server: LocalServer
) -> None:
    server.faults.add("/runs/get", times=8, status=503)
    ran = dag_runner.run_tasks(service(free_port()))
    assert ran.tasks == {"serve": "success"}
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    assert run.raw_status == "running"


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_just_after_the_answer_stops_the_service(server: LocalServer) -> None:
    port = free_port()
    task = DstackServiceOperator(
        task_id="train",
        configuration={"type": "service", "port": port, "commands": [_SERVE.format(port=port)]},
        poll_interval=0.3,
        durable=False,
    )
    readiness = task.readiness

    def ready_then_killed(context: Any) -> Any:
        is_ready = readiness(context)

        def killed_when_ready(run: Any) -> bool:
            found = is_ready(run)
            if found:
                # As in the signal handler, before the main thread polls again.
                task._killed = True
            return found

        return killed_when_ready

    task.readiness = ready_then_killed  # type: ignore[method-assign]
    with pytest.raises(DstackRunInterrupted):
        task.execute(CONTEXT)
    (run,) = runs_of(server, f"airflow:{TI.dag_id}/")
    wait_for("end of the service", lambda: run.refresh().outcome(), 30)


def test_stop_takes_names_and_tolerates_missing_runs(dag_runner: DagRunner, server: LocalServer) -> None:
    with server.client() as client:
        going = client.runs.submit({"type": "task", "commands": ["sleep 600"]}, run_name="going")
        over = client.runs.submit({"type": "task", "commands": ["true"]}, run_name="over")
        over.wait(30, poll_interval=0.1)
    ran = dag_runner.run_tasks(
        "train = DstackRunOperator(task_id='train', configuration=Task(commands=['true']), poll_interval=0.3)\n"
        "DstackStopRunOperator(task_id='many', run_name=['going', 'over', 'never', ''], poll_interval=0.3)\n"
        "DstackStopRunOperator(task_id='none', run_name=\"{{ ti.xcom_pull('nobody') }}\")\n"
        "DstackStopRunOperator(task_id='result', run_name=train.output)\n"
    )
    assert ran.state == "success"
    assert ran.values["many"] == {"going": "terminated", "over": "done"}
    assert ran.values["none"] == {}
    assert list(ran.values["result"].values()) == ["done"]
    assert going.refresh().raw_status == "terminated"


def test_stop_need_not_wait(dag_runner: DagRunner, server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["trap '' TERM; sleep 600"]}, run_name="slow")
        wait_for("running run", lambda: run.refresh().raw_status == "running")
    ran = dag_runner.run_tasks(
        "DstackStopRunOperator(task_id='stop', run_name='slow', wait_for_completion=False)"
    )
    assert ran.values["stop"] == {"slow": "stopping"}


def test_stop_leaves_the_runs_of_others_alone(dag_runner: DagRunner, server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit(
            {"type": "task", "commands": ["sleep 600"]},
            run_name="xx",
            marker="airflow:other/run/serve/1of1#abc",
        )
    ran = dag_runner.run_tasks("DstackStopRunOperator(task_id='stop', runs_of='serve')")
    assert ran.tasks == {"stop": "success"}
    assert paths(server, "/runs/stop") == []
    run.stop(abort=True)


def test_in_a_mapped_group_each_stops_its_own(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(
        """
@task_group
def serve_and_use(port):
    what = {"type": "service", "port": 80, "commands": ["sleep 600"]}
    serve = DstackRunOperator(task_id="serve", configuration=what, poll_interval=0.3,
                              execution_timeout=timedelta(seconds=6), on_kill_action="keep")
    stop = DstackStopRunOperator(task_id="stop", runs_of=serve, poll_interval=0.3, trigger_rule="all_done")
    serve >> stop

serve_and_use.expand(port=[1, 2])
"""
    )
    runs = runs_of(server, f"airflow:{ran.dag_id}/")
    assert len(runs) == 2
    assert {run.raw_status for run in runs} == {"terminated"}


def test_a_teardown_without_setup_stops_what_a_failed_task_left(
    dag_runner: DagRunner, server: LocalServer
) -> None:
    ran = dag_runner.run_tasks(
        """
train = DstackRunOperator(task_id="train", configuration=Task(commands=["sleep 600"]), poll_interval=0.3,
                          execution_timeout=timedelta(seconds=6), on_kill_action="keep")
cleanup = DstackStopRunOperator(task_id="cleanup", runs_of=train, poll_interval=0.3)
train >> cleanup.as_teardown()
"""
    )
    assert ran.tasks == {"train": "failed", "cleanup": "success"}
    assert ran.state == "failed"
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    assert run.raw_status == "terminated"
    assert ran.values["cleanup"] == {run.name: "terminated"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({}, "got neither"), ({"run_name": "a", "runs_of": "b"}, "got both")],
)
def test_stop_needs_either_names_or_a_task(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DstackStopRunOperator(task_id="stop", **arguments)


def test_operators_survive_serialization() -> None:
    from airflow.models.serialized_dag import SerializedDagModel
    from airflow.serialization.serialized_objects import LazyDeserializedDAG

    with DAG("services", schedule=None) as dag:
        serve = DstackServiceOperator(task_id="serve", configuration={"type": "service", "port": 80})
        DstackStopRunOperator(task_id="stop", runs_of=serve).as_teardown(setups=serve)
    # The dag processor writes this model and the API server reads it, with links. The scheduler and dag.test() read
    # without links, and Airflow stores that choice per process; reading through the model sets it again.
    again = SerializedDagModel(LazyDeserializedDAG.from_dag(dag)).dag
    assert [again.get_task(name).task_type for name in ("serve", "stop")] == [
        "DstackServiceOperator",
        "DstackStopRunOperator",
    ]
    assert again.get_task("serve").extra_links == [
        "dstack logs",
        "dstack metrics",
        "dstack run",
        "dstack service",
    ]
    assert again.get_task("stop").is_teardown


def test_an_answer_needs_the_token(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(service(free_port()))
    assert requests.get(ran.values["serve"], timeout=10).status_code == 403
