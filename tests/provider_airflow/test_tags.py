"""The tags of a task's run, and the addresses that its links lead to."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from airflow_provider_dstack._tags import automatic_tags
from airflow_provider_dstack.links import RUN_LINKS
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.tries import Tries


def tags_of(server: LocalServer) -> list[Any]:
    """Return the tags of all runs, as the server has them."""
    shown: list[Any] = []
    for run in server.client().runs.list(all=True):
        reply = requests.post(
            f"{server.url}/api/project/{server.project}/runs/get",
            json={"run_name": run.name},
            headers={"Authorization": f"Bearer {server.token}"},
            timeout=10,
        )
        shown.append(reply.json()["run_spec"]["configuration"]["tags"])
    return shown


def test_a_run_has_tags_that_name_its_task(server: LocalServer) -> None:
    tries = Tries(server, None, owner="Team ML")
    tries.ti.run_id = "scheduled__2026-11-23T12:00:00+00:00"
    tries.ti.map_index = 3
    tries.execute("true")
    assert tags_of(server) == [
        {
            "airflow-dag": "d",
            "airflow-task": "train",
            "airflow-run": "scheduled__2026-11-23t12-00-00-00-00",
            "airflow-try": "1",
            "airflow-map-index": "3",
            "airflow-owner": "team-ml",
        }
    ]


def test_what_has_no_value_has_no_tag() -> None:
    ti = SimpleNamespace(dag_id="--", task_id="t", run_id="r", try_number=2, map_index=-1)
    context: Any = {"ti": ti}
    assert automatic_tags(context, None) == {"airflow-task": "t", "airflow-run": "r", "airflow-try": "2"}


def test_a_name_without_ascii_has_a_tag_too() -> None:
    ti = SimpleNamespace(dag_id="训练", task_id="Größe", run_id="r", try_number=1, map_index=-1)
    context: Any = {"ti": ti}
    tags = automatic_tags(context, None)
    assert (tags["airflow-dag"], tags["airflow-task"]) == ("dag-a29c0d", "grosse")


@pytest.mark.parametrize(
    ("tags", "of_connection", "expected"),
    [
        ({"team": "task"}, {"team": "connection", "floor": "3"}, {"team": "task", "floor": "3"}),
        (None, {"team": "connection"}, {"team": "connection"}),
        ({"airflow-dag": "mine"}, None, {"airflow-dag": "mine"}),
        ({"dag": "{{ ti.dag_id }}"}, None, {"dag": "d"}),
    ],
)
def test_a_tasks_own_tags_win_over_the_connections(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tags: Any, of_connection: Any, expected: Any
) -> None:
    connect(server, monkeypatch, of_connection)
    tries = Tries(server, None)
    operator = tries.operator("true", tags=tags)
    operator.render_template_fields(tries.context)
    operator.execute(tries.context)
    (sent,) = tags_of(server)
    assert sent.items() >= expected.items()
    assert sent["airflow-task"] == "train"


@pytest.mark.parametrize(("tags", "of_connection"), [(False, {"team": "ml"}), (None, False)])
def test_tags_can_be_turned_off_in_a_task_and_in_the_connection(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tags: Any, of_connection: Any
) -> None:
    connect(server, monkeypatch, of_connection)
    Tries(server, None).execute("true", tags=tags)
    assert tags_of(server) == [None]


def test_a_wrong_tag_is_reported_before_anything_is_submitted(server: LocalServer) -> None:
    with pytest.raises(Exception, match=r"^tags: expected a value of at most 256 .* for team, got 'ü'"):
        Tries(server, None).execute("true", tags={"team": "ü"})
    assert tags_of(server) == []


def test_an_updated_service_keeps_the_tags_of_its_first_submission(server: LocalServer) -> None:
    for number in ("1", "2"):
        tries = Tries(server, None)
        tries.ti.run_id = number
        configuration = {"type": "service", "port": 80 + int(number), "commands": ["sleep 60"], "auth": False}
        operator = DstackServiceOperator(
            task_id="train",
            configuration=configuration,
            run_name="chat",
            on_active="update",
            poll_interval=0.1,
        )
        operator.readiness = lambda context: lambda run: True  # type: ignore[method-assign]
        operator._service_url = "x"
        operator.execute(tries.context)
    (run,) = server.client().runs.list()
    assert run.deployment_num == 1
    assert [tags["airflow-run"] for tags in tags_of(server)] == ["1"]


def test_the_links_lead_to_pages_that_a_browser_reaches(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(server, monkeypatch, None, ui_url="https://gpu.example.com")
    pushed: dict[str, Any] = {}
    tries = Tries(server, None)
    tries.ti.xcom_push = lambda key, value: pushed.update({key: value})
    result = tries.execute("true")
    page = f"https://gpu.example.com/projects/main/runs/{result['run_id']}"
    assert result["url"] == page
    assert [pushed[link.xcom_key] for link in RUN_LINKS] == [page, f"{page}/logs", f"{page}/metrics"]


def connect(server: LocalServer, monkeypatch: pytest.MonkeyPatch, tags: Any, **extra: Any) -> None:
    extra |= {} if tags is None else {"default_tags": tags}
    fields = {"host": server.url, "login": server.project, "password": server.token, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", json.dumps({"conn_type": "dstack", **fields}))
