"""What a configuration leaves open is filled in by the operator: env, args, a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack.errors import DstackNoCapacity
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import GPU, Profile, Resources
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths
from tests.provider_airflow.test_operator import CONTEXT, RUN
from tests.provider_airflow.test_secrets import kept

TRUE: dict[str, Any] = {"type": "task", "commands": ["true"]}
PROFILES = "profiles:\n- {name: other, max_price: 1.3}\n- {name: usual, default: true, max_price: 1.5}\n"


def operator(**arguments: Any) -> DstackRunOperator:
    return DstackRunOperator(**{"task_id": "train", "configuration": TRUE, "poll_interval": 0.1, **arguments})


def spec_of(server: LocalServer, name: str) -> dict[str, Any]:
    reply = requests.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        json={"run_name": name},
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=10,
    )
    spec: dict[str, Any] = reply.json()["run_spec"]
    return spec


def submitted(server: LocalServer, **arguments: Any) -> dict[str, Any]:
    """Execute an operator, and return the run_spec that the server got."""
    operator(**arguments).execute(CONTEXT)
    return spec_of(server, RUN.name)


def test_names_without_a_value_come_from_the_argument_else_from_the_worker(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_WORKER", "worker-value")
    monkeypatch.setenv("GIVEN", "not this")
    spec = submitted(
        server,
        configuration={**TRUE, "env": ["FROM_WORKER", "GIVEN", "OWN=own", "CHANGED=before"]},
        env={"GIVEN": "given", "CHANGED": "after", "MORE": "more"},
    )
    assert spec["configuration"]["env"] == {
        "FROM_WORKER": "worker-value",
        "GIVEN": "given",
        "OWN": "own",
        "CHANGED": "after",
        "MORE": "more",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"configuration": {**TRUE, "env": ["NO_SUCH_A", "B=1", "NO_SUCH_C"]}}, "NO_SUCH_A, NO_SUCH_C"),
        ({"env": ["A=1"]}, "env: expected a mapping"),
        ({"args": "--epochs 3"}, "args: expected a list"),
        ({"configuration": {**TRUE, "commands": ["echo ${{ nothing.here }}"]}}, "${{ nothing.here }}"),
        ({"profile": "spot"}, "profile: expected profiles_file or repo_dir with profile 'spot'"),
        ({"profiles_file": "/nowhere/profiles.yml"}, "/nowhere/profiles.yml"),
        ({"configuration": {"type": "dev-environment", "ide": "vscode"}}, "without max_duration"),
        ({"configuration": {**TRUE, "schedule": {"cron": "* * * * *"}}}, "schedule: "),
    ],
)
def test_a_wrong_or_missing_value_is_one_error_before_submission(
    server: LocalServer, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(AirflowFailException) as caught:
        operator(**arguments).execute(CONTEXT)
    assert expected in str(caught.value)
    assert paths(server, "/runs/apply") == []


def test_a_service_on_a_schedule_is_refused(server: LocalServer) -> None:
    service = {"type": "service", "port": 80, "commands": ["true"], "schedule": {"cron": "* * * * *"}}
    with pytest.raises(AirflowFailException, match="schedule: "):
        DstackServiceOperator(task_id="serve", configuration=service).execute(CONTEXT)


def test_args_are_filled_into_the_commands(server: LocalServer) -> None:
    what = {"type": "task", "commands": ["echo ${{ run.args }} '$${{ x }}' '${{ secrets.a }}'"]}
    spec = submitted(server, configuration=what, args=["--name", "two words"], reports=False)
    assert spec["configuration"]["commands"] == ["echo --name 'two words' '${{ x }}' '${{ secrets.a }}'"]


def test_nothing_of_the_workers_home_applies(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".dstack").mkdir()
    (tmp_path / ".dstack" / "profiles.yml").write_text(PROFILES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DSTACK_PROFILE", "spot")
    monkeypatch.chdir(tmp_path)
    assert submitted(server)["profile"].get("max_price") is None


@pytest.mark.parametrize(
    ("named", "price"), [({}, 1.5), ({"profile": "other"}, 1.3)], ids=["default", "named"]
)
def test_a_profile_is_found_in_repo_dir(
    server: LocalServer, tmp_path: Path, named: dict[str, Any], price: float
) -> None:
    (tmp_path / ".dstack").mkdir()
    (tmp_path / ".dstack" / "profiles.yml").write_text(PROFILES)
    spec = submitted(server, repo_dir=str(tmp_path), **named)
    assert spec["profile"]["max_price"] == price


def test_the_limits_of_a_profile_count(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "p.yml").write_text(PROFILES.replace("1.5", "0.7"))
    with pytest.raises(DstackNoCapacity):
        operator(profiles_file=tmp_path / "p.yml").execute(CONTEXT)


def test_a_profile_may_be_a_file_beside_the_dag_or_an_object(
    dag_runner: DagRunner, server: LocalServer
) -> None:
    (dag_runner.folder / "my-profiles.yml").write_text(PROFILES)
    ran = dag_runner.run(
        f"configuration={TRUE}, profile='{{{{ \"usual\" }}}}', profiles_file='my-profiles.yml', "
        "run_name='with-profile', poll_interval=0.2"
    )
    assert ran.task_state == "success"
    assert spec_of(server, "with-profile")["profile"]["max_price"] == 1.5
    assert submitted(server, profile=Profile(name="own", max_price=2.0))["profile"]["max_price"] == 2.0


@pytest.mark.parametrize("form", ["operator", "decorator", "configuration", "text"])
def test_the_same_dict_means_the_same_everywhere(
    form: str, dag_runner: DagRunner, server: LocalServer
) -> None:
    wanted = {"gpu": {"name": "A100", "memory": "80GB", "count": 1}, "memory": "1GB.."}
    task = f"DstackRunOperator(task_id='train', run_name='run', poll_interval=0.2, configuration={TRUE}"
    bodies = {
        "operator": f"{task}, run_resources={wanted})",
        "configuration": f"{task[:-1]}, 'resources': {wanted}}})",
        "text": f"{task}, run_resources={{'gpu': 'A100:80GB:1', 'memory': '1GB..'}})",
        "decorator": (
            f"@task.dstack(resources={wanted}, run_name='run', poll_interval=0.2)\n"
            "def train():\n    return 1\ntrain()"
        ),
    }
    assert dag_runner.run_tasks(bodies[form]).state == "success"
    found = spec_of(server, "run")["configuration"]["resources"]
    # Exact, as in a .dstack.yml.
    assert found["gpu"]["memory"] == {"min": 80.0, "max": 80.0}
    assert found["gpu"]["name"] == ["A100"]
    assert found["memory"]["max"] is None


@pytest.mark.parametrize(
    ("given", "memory"),
    [
        ("24GB..", {"min": 24.0, "max": None}),
        ("A100:40GB..:2", {"min": 40.0, "max": None}),
        ({"gpu": "24GB.."}, {"min": 24.0, "max": None}),
        (Resources(gpu="24GB"), {"min": 24.0, "max": None}),
        (Resources(gpu=GPU(memory="24GB", count=1)), {"min": 24.0, "max": None}),
        (1, None),
        ({"gpu": 1}, None),
    ],
)
def test_resources_take_objects_and_texts(server: LocalServer, given: Any, memory: Any) -> None:
    gpu = submitted(server, run_resources=given)["configuration"]["resources"]["gpu"]
    assert gpu["memory"] == memory


@pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
def test_values_of_env_are_shown_nowhere(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr("airflow_provider_dstack.operators._SYNC_SECONDS", 1.0)
    monkeypatch.setenv("AIRFLOW_VAR_HF_TOKEN", "variable-sesame-11")
    monkeypatch.setenv(
        "AIRFLOW_CONN_HUB",
        '{"conn_type": "http", "login": "robot-of-the-hub", "password": "connection-sesame-22"}',
    )
    monkeypatch.setenv("KEY_OF_WORKER", "worker-sesame-33")
    ran = dag_runner.run_tasks(
        f"""
DstackRunOperator(
    task_id="train",
    configuration={{
        "type": "task",
        "env": ["HF_TOKEN", "KEY_OF_WORKER"],
        "commands": ["sleep {3 if deferrable else 0}", "echo $STAGE-ing as $LOGIN: $HF_TOKEN $HUB $KEY_OF_WORKER", "exit 3"],
    }},
    env={{"HF_TOKEN": "{{{{ var.value.hf_token }}}}", "HUB": "{{{{ conn.hub.password }}}}",
         "STAGE": "rehearse", "LOGIN": "{{{{ conn.hub.login }}}}"}},
    poll_interval=0.3,
    deferrable={deferrable},
)
"""
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "rehearse-ing as robot-of-the-hub: *** *** ***" in output
    for secret in ("variable-sesame-11", "connection-sesame-22", "worker-sesame-33"):
        assert secret not in output
        assert not [row for row in kept(ran.dag_id) if secret in row]
    # What the run got beside its secrets is on the page of rendered fields.
    assert [row for row in kept(ran.dag_id) if "robot-of-the-hub" in row and "rehearse" in row]


@pytest.mark.parametrize("form", ["file", "dict", "model"])
def test_files_are_looked_for_beside_the_configuration(
    form: str, dag_runner: DagRunner, server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = dag_runner.folder / "conf"
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text("{}")
    (folder / "with-files.yml").write_text("type: task\ncommands: [cat params.json]\nfiles: [params.json]\n")
    forms = {
        "file": "'conf/with-files.yml'",
        "dict": "{'type': 'task', 'commands': ['cat params.json'], 'files': ['conf/params.json:params.json']}",
        "model": "Task(commands=['cat params.json'], files=['conf/params.json:params.json'])",
    }
    ended = dag_runner.run(f"configuration={forms[form]}, poll_interval=0.2")
    assert ended.task_state == "success"
