"""How busy a run's machine was: the line in the task's log, its XCom, and the tab on the task's page."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from airflow.plugins_manager import AirflowPlugin
from starlette.applications import Starlette
from starlette.routing import Mount

from airflow_provider_dstack import _run_reports
from airflow_provider_dstack._log_relay import new_relay, records
from airflow_provider_dstack._run_reports import RunReports
from airflow_provider_dstack.errors import DstackRunFailed
from airflow_provider_dstack.utilization_plugin import DstackUtilizationPlugin, UtilizationApp
from dstack_core import Outcome, RunFinished, UsageSeries, Utilization
from dstack_core.local import LocalServer
from tests.provider_airflow.support import connection_json
from tests.provider_airflow.test_operator import CONTEXT, operator
from tests.provider_airflow.test_relay import OUTCOME, PROGRESS
from tests.provider_airflow.triggering import payloads, submitted, trigger_for

GIB = 2**30
USAGE = Utilization(
    gpu_mean=31.2,
    gpu_max=97.0,
    gpu_memory_peak=11 * GIB,
    gpu_memory_total=80 * GIB,
    gpus=1,
    gpu="A100",
    points=3,
    advice="A smaller GPU would do.",
    series=UsageSeries(
        (0.0, 10.0, 20.0), (1, 1, 1), (10.0, 20.0, 97.0), (None,) * 3, (None,) * 3, (None,) * 3
    ),
)
LINE = "GPU 31 % mean, 97 % max; 11 of 80 GB"
# Busy for long enough that a server has two values.
COMMAND = "sleep 1"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Run a server that measures often, and read values of short runs too."""
    monkeypatch.setattr("dstack_core._flow.utilization._SHORTEST_RUN", 0.0)
    with LocalServer(metrics_seconds=0.1, gpu_usage=(31, 11)) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        yield server


@pytest.fixture
def xcoms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        _run_reports, "push_xcom", lambda ti, key, value: kept.update({key: json.loads(json.dumps(value))})
    )
    return kept


def with_gpu(*commands: str) -> dict[str, Any]:
    return {"type": "task", "commands": [*commands], "resources": {"gpu": 1}}


def test_the_end_of_the_log_and_the_xcom() -> None:
    relay, reports = new_relay(), RunReports()
    event = RunFinished(PROGRESS, replace(OUTCOME, utilization=USAGE))
    shown = [text for _, text in records(relay, event, reports)]
    assert shown[-2:] == [f"Run {OUTCOME.run_name} used {LINE}", "A smaller GPU would do."]
    kept = reports.xcoms()["dstack_utilization"]
    assert (kept["run_name"], kept["url"], kept["gpu_mean"]) == (OUTCOME.run_name, OUTCOME.url, 31.2)
    assert RunReports(json.loads(json.dumps(reports.state()))).xcoms() == json.loads(
        json.dumps(reports.xcoms())
    )


def test_nothing_is_shown_of_a_run_that_was_not_measured() -> None:
    relay, reports = new_relay(), RunReports()
    shown = [text for _, text in records(relay, RunFinished(PROGRESS, OUTCOME), reports)]
    assert len(shown) == 1
    assert reports.xcoms() == {}


@pytest.mark.parametrize("command", [COMMAND, f"{COMMAND}; exit 3"])
def test_a_waiting_task(
    measuring: LocalServer, xcoms: dict[str, Any], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    task = operator(configuration=with_gpu(command), poll_interval=0.1)
    if "exit" in command:
        with pytest.raises(DstackRunFailed):
            task.execute(CONTEXT)
    else:
        outcome = Outcome.from_dict(task.execute(CONTEXT))
        assert outcome.utilization is not None
        assert outcome.utilization.gpu_mean == 31.0
    assert "used GPU 31 % mean, 31 % max; 11 of 80 GB; CPU" in capsys.readouterr().out
    assert xcoms["dstack_utilization"]["gpu_memory_peak"] == 11 * GIB
    assert len(paths_of_metrics(measuring)) == 1


def test_a_deferred_task(measuring: LocalServer) -> None:
    with measuring.client() as client:
        run = client.runs.submit(with_gpu(COMMAND), marker="ours")
    (payload,) = asyncio.run(payloads(trigger_for(run)))
    assert payload["outcome"]["utilization"]["gpu_mean"] == 31.0
    assert payload["reported"]["dstack_utilization"]["gpu"] == "A100"
    assert len(paths_of_metrics(measuring)) == 1


def test_a_short_run_costs_no_request(server: LocalServer) -> None:
    run = submitted(server, "true")
    (payload,) = asyncio.run(payloads(trigger_for(run)))
    assert payload["outcome"]["utilization"] is None
    assert paths_of_metrics(server) == []


def paths_of_metrics(server: LocalServer) -> list[str]:
    return [request.path for request in server.requests if "/metrics/job/" in request.path]


# The tab.


class Page:
    """The application as Airflow mounts it."""

    def __init__(self) -> None:
        (mounted,) = DstackUtilizationPlugin.fastapi_apps
        self._app = Starlette(routes=[Mount(mounted["url_prefix"], mounted["app"])])

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as client:
                return await client.request(method, f"/dstack-utilization{path}", **options)

        return asyncio.run(request())


@pytest.fixture
def page() -> Page:
    return Page()


def xcom(**changes: Any) -> dict[str, Any]:
    return {"run_name": "train-1", "url": "https://dstack/runs/1", **USAGE.to_dict(), **changes}


def test_airflow_finds_the_plugin() -> None:
    project = Path(__file__).parents[2] / "providers" / "airflow" / "pyproject.toml"
    declared = tomllib.loads(project.read_text())["project"]["entry-points"]["airflow.plugins"]
    module, _, name = declared["dstack_utilization"].partition(":")
    plugin = getattr(import_module(module), name)
    assert issubclass(plugin, AirflowPlugin)
    plugin.validate()
    (view,) = plugin.external_views
    assert view["destination"] == "task_instance"
    assert view["href"].startswith("dstack-utilization/?")
    for placeholder in ("{DAG_ID}", "{RUN_ID}", "{TASK_ID}", "{MAP_INDEX}"):
        assert placeholder in view["href"]


@pytest.mark.parametrize("path", ["/", "/utilization.js", "/utilization.css"])
def test_the_page_is_static_and_runs_only_its_own_script(page: Page, path: str) -> None:
    reply = page.send("GET", f"{path}?dag_id=<script>")
    assert reply.status_code == 200
    assert "default-src 'none'; script-src 'self'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in reply.text
    assert page.send("HEAD", path).content == b""


def test_the_chart_is_made_of_what_the_page_sends(page: Page) -> None:
    reply = page.send("POST", "/chart", json=xcom(run_name="<script>alert(1)</script>"))
    assert reply.status_code == 200
    shown = reply.json()
    assert (shown["text"], shown["advice"]) == (f"The run used {LINE}.", "A smaller GPU would do.")
    assert "<polyline" in shown["svg"]
    assert "<script" not in shown["svg"]


@pytest.mark.parametrize(
    "body", [b"", b"[", b"3", b"{}", b"[" * 60_000, b'{"run_name": "' + b"x" * 70_000 + b'"}']
)
def test_anything_else_is_refused(page: Page, body: bytes) -> None:
    reply = page.send("POST", "/chart", content=body)
    assert (reply.status_code, reply.text) == (422, "Not the utilization of a run")


def test_there_is_nothing_else(page: Page) -> None:
    assert page.send("GET", "/chart").status_code == 404
    assert page.send("POST", "/").status_code == 404
    assert page.send("GET", "/../secrets").status_code == 404
    assert page.send("GET", "/get_provider_info.py").status_code == 404


def test_other_protocols_are_left_alone() -> None:
    async def never(message: Any = None) -> Any:
        raise AssertionError("nothing is read or sent")

    asyncio.run(UtilizationApp()({"type": "websocket"}, never, never))
