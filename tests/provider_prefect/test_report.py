"""Artifacts and events, read back from a real Prefect server."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import RunFailedError, RunStoppedError
from dstack_core.integration import OUTCOME_FIELDS, outcome_table
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from prefect_dstack._report import Report

from .support import artifacts_of, events_of, outcome_of, the_run, until


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_run_is_shown_in_its_flow_run(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    ids: list[Any] = []

    @flow
    def shown() -> None:
        ids.append(flow_run.id)
        configuration = {"type": "task", "name": "train", "commands": ["exit 7"]}
        task.submit(configuration, credentials, poll_interval=0.1).result()

    with pytest.raises(RunFailedError):
        shown()
    run, outcome = the_run(dstack), outcome_of(the_run(dstack))
    found = artifacts_of(ids[0])
    assert set(found) == {"dstack-train", "dstack-train-page", "dstack-train-progress"}
    table = found["dstack-train"].data
    assert table.startswith(f"{outcome_table(outcome)}\n| Tags | prefect-flow=shown, prefect-flow-run=")
    assert table.count("\n") == outcome_table(outcome).count("\n") + 1
    assert run.url in found["dstack-train-page"].data
    assert found["dstack-train-progress"].data == 100.0
    assert "failed" in found["dstack-train-progress"].description
    started, ended = until(lambda: (e := events_of(run.id)) and len(e) == 2 and e, seconds=20)  # type: ignore[misc]
    assert (started["event"], ended["event"]) == ("dstack.run.started", "dstack.run.failed")
    assert ended["follows"] == started["id"]
    assert ended["resource"]["dstack.category"] == outcome.category == "user.exit"
    assert "dstack.category" not in started["resource"]
    assert found["dstack-train"].metadata_["dstack.category"] == "user.exit"
    assert ended["payload"] == outcome.to_dict()
    assert set(ended["payload"]) == {field.name for field in OUTCOME_FIELDS}
    assert any(str(ids[0]) in related["prefect.resource.id"] for related in ended["related"])


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_service_is_linked_and_its_progress_shows_while_it_runs(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    ids: list[Any] = []
    seen: list[dict[str, Any]] = []

    def look_and_stop() -> None:
        def progress() -> Any:
            found = artifacts_of(ids[0]) if ids else {}
            running = "dstack-web-progress" in found and found["dstack-web-progress"].data == 50.0
            return found if running else None

        seen.append(until(progress))
        the_run(dstack).stop()

    @flow
    def serving() -> None:
        ids.append(flow_run.id)
        service = {"type": "service", "name": "web", "port": 8000, "commands": ["sleep 60"]}
        task.submit(service, credentials, poll_interval=0.1).result()

    watcher = threading.Thread(target=look_and_stop)
    watcher.start()
    with pytest.raises(RunStoppedError):
        serving()
    watcher.join()
    assert str(the_run(dstack).service_url) in seen[0]["dstack-web-service"].data
    assert "running" in seen[0]["dstack-web-progress"].description


@pytest.mark.usefixtures("prefect_server")
def test_artifacts_can_be_left_out(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def plain() -> Any:
        run_task({"type": "task", "commands": ["true"]}, credentials, poll_interval=0.1, artifacts=False)
        return flow_run.id

    assert artifacts_of(plain()) == {}


@pytest.mark.usefixtures("prefect_server")
def test_a_prefect_server_that_takes_no_connection_fails_no_run(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[None] = []

    def refuse() -> Any:
        opened.append(None)
        raise RuntimeError("no connection")

    monkeypatch.setattr("prefect_dstack._report.quick_prefect_client", refuse)

    @flow
    def shown() -> dict[str, Any]:
        return dict(run_task({"type": "task", "commands": ["true"]}, credentials, poll_interval=0.1))

    assert shown()["status"] == "done"
    # At the start and at the end; without the progress artifact there is nothing to renew.
    assert len(opened) == 2


def test_a_prefect_server_that_takes_nothing_fails_no_run(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    for name in ("create_markdown_artifact", "create_link_artifact", "create_progress_artifact"):
        monkeypatch.setattr(f"prefect.artifacts.{name}", refuse)
    monkeypatch.setattr("prefect.events.emit_event", refuse)
    with dstack.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["true"]}, run_name="train")
        report = Report("train", logging.getLogger("report-test"), artifacts=True)
        report.start(run)
        for event in run.follow(poll_interval=0.1):
            report.show(event)
        report.end(run.refresh().outcome())
