"""How busy a run's machine was: the lines in the flow run's log, and the artifact with a chart."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from prefect import flow
from prefect.runtime import flow_run
from pydantic import SecretStr

from dstack_core import RunFailedError, Utilization
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import artifacts_of


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Run a server that measures often, and read values of short runs too."""
    monkeypatch.setattr("dstack_core._flow.utilization._SHORTEST_RUN", 0.0)
    with LocalServer(metrics_seconds=0.1, gpu_usage=(31, 11)) as server:
        yield server


@pytest.fixture
def measured(measuring: LocalServer) -> DstackCredentials:
    return DstackCredentials(
        server_url=measuring.url, project_name=measuring.project, user_token=SecretStr(measuring.token)
    )


def metrics_requests(server: LocalServer) -> list[str]:
    return [request.path for request in server.requests if "/metrics/job/" in request.path]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("command", ["sleep 1", "sleep 1; exit 3"])
def test_log_outcome_and_chart(
    task: Any,
    command: str,
    measuring: LocalServer,
    measured: DstackCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids: list[Any] = []
    outcomes: list[Any] = []

    @flow
    def busy() -> None:
        ids.append(flow_run.id)
        configuration = {"type": "task", "name": "train", "commands": [command], "resources": {"gpu": 1}}
        outcomes.append(task.submit(configuration, measured, poll_interval=0.1).result())

    if "exit" in command:
        with pytest.raises(RunFailedError):
            busy()
    else:
        busy()
        usage = Utilization.from_dict(outcomes[0]["utilization"])
        assert (usage.gpu_mean, usage.gpu) == (31.0, "A100")
    assert "used GPU 31 % mean, 31 % max; 11 of 80 GB; CPU" in caplog.text
    chart = artifacts_of(ids[0])["dstack-train-utilization"]
    text, _, image = chart.data.partition("\n\n")
    assert "used GPU 31 % mean, 31 % max; 11 of 80 GB; CPU" in text
    svg = base64.b64decode(image.removeprefix("![Utilization](data:image/svg+xml;base64,").removesuffix(")"))
    assert ElementTree.fromstring(svg).tag.endswith("svg")  # noqa: S314 - our own
    assert "| Utilization | GPU 31 % mean" in artifacts_of(ids[0])["dstack-train"].data
    assert len(metrics_requests(measuring)) == 1


@pytest.mark.usefixtures("prefect_server")
def test_a_short_run_costs_no_request_and_has_no_chart(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    ids: list[Any] = []

    @flow
    def short() -> None:
        ids.append(flow_run.id)
        run_task({"type": "task", "name": "train", "commands": ["true"]}, credentials, poll_interval=0.1)

    short()
    assert "dstack-train-utilization" not in artifacts_of(ids[0])
    assert metrics_requests(dstack) == []
