"""What ``prefect-dstack doctor`` finds of Prefect: each fault that is planted is named, with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.automations import Automation, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from dstack_core.integration import Finding
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, reap_runs
from prefect_dstack import _doctor as doctor
from prefect_dstack._doctor import prefect_findings
from tests.ports import free_port

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def api() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        # Other tests of this process end flow runs in the middle of a cancellation.
        left = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
        for one in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=left)):
            client.delete_flow_run(one.id)
        yield client


def findings(block: str | None = None) -> list[Finding]:
    found = list(prefect_findings(block))
    for each in found:
        assert bool(each.advice) == (each.state in ("warning", "error")), each
    return found


def found(check: str, word: str = "") -> Finding:
    return next(each for each in findings() if each.check == check and word in each.text)


def pool(api: SyncPrefectClient, name: str, kind: str = "dstack") -> WorkPool:
    return api.create_work_pool(WorkPoolCreate(name=name, type=kind), overwrite=True)


@flow
def clean_up(block: DstackCredentials) -> None:
    reap_runs(block)


def test_a_bare_server_has_no_block_no_reaper_and_no_automation(
    api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(api), "read_block_documents_by_type", lambda *_, **__: [])
    monkeypatch.setattr(type(api), "read_task_runs", lambda *_, **__: [])
    for each in api.read_automations():
        api.delete_automation(each.id)
    states = {each.check: each.state for each in findings() if each.check != "Prefect work pool"}
    assert states == {
        "Prefect": "ok",
        "Prefect block": "warning",
        "Prefect reaper": "warning",
        "Prefect hooks": "ok",
        "Prefect automation": "warning",
    }
    assert "prefect-dstack reap" in found("Prefect reaper").advice
    assert "prefect block register" in found("Prefect block").advice
    # The named block is the finding of the configuration.
    assert "Prefect block" not in {each.check for each in findings("prod")}


def test_nothing_is_wrong(api: SyncPrefectClient, credentials: DstackCredentials) -> None:
    credentials.save("doctor", overwrite=True)
    pool(api, "healthy")
    api.send_worker_heartbeat(work_pool_name="healthy", worker_name="w1", heartbeat_interval_seconds=30)
    clean_up(credentials)
    # Its methods are typed as sync or async by turns.
    automation: Any = Automation(
        name="Crash zombie flows",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=90),
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message="no heartbeat", force=False)],
    ).create()
    found_all = [each for each in findings() if each.check != "Prefect work pool" or "healthy" in each.text]
    assert [each.state for each in found_all] == ["ok"] * 6, found_all
    assert "doctor" in next(each.text for each in found_all if each.check == "Prefect block")
    automation.disable()
    assert found("Prefect automation").state == "warning"
    assert "detect-zombie-flows" in found("Prefect automation").advice
    api.delete_automation(automation.id)


def test_a_work_pool_has_no_worker_or_is_paused(api: SyncPrefectClient) -> None:
    pool(api, "empty")
    pool(api, "of-processes", "process")
    assert "prefect worker start --pool empty" in found("Prefect work pool", "empty").advice
    assert not [each for each in findings() if "of-processes" in each.text]
    api.update_work_pool("empty", WorkPoolUpdate(is_paused=True))
    assert "prefect work-pool resume empty" in found("Prefect work pool", "empty").advice
    api.delete_work_pool("empty")


def test_the_schedule_of_the_reaper_does_not_work(
    api: SyncPrefectClient, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_up(credentials)
    monkeypatch.setattr(doctor, "_OLDEST_PASS", timedelta(0))
    assert "Its last pass was on" in found("Prefect reaper").text
    monkeypatch.undo()
    assert "without a deployment" in found("Prefect reaper").text

    flow_id = api.create_flow(clean_up)
    schedule = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(minutes=15)))
    deployment_id = api.create_deployment(flow_id, "every-15-minutes", schedules=[schedule])
    flow_run = api.create_flow_run_from_deployment(deployment_id)
    read = api.read_flow_run
    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", lambda self, _: read(flow_run.id))
    assert found("Prefect reaper").text == "It runs in deployment every-15-minutes."
    api.pause_deployment(deployment_id)
    assert "every-15-minutes is paused" in found("Prefect reaper").text
    api.delete_deployment(deployment_id)


def test_a_pass_of_the_reaper_failed(dstack: LocalServer, credentials: DstackCredentials) -> None:
    wrong = credentials.model_copy(update={"project_name": "nope"})
    with pytest.raises(Exception, match="nope"):
        clean_up(wrong)
    assert "Its last pass ended as Failed" in found("Prefect reaper").text


def test_no_process_carries_out_a_cancellation(
    api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests that kill processes leave such flow runs on the server that all share.
    flow_run = api.create_flow_run(clean_up, state=Cancelling(), name="stuck")
    assert found("Prefect hooks").state == "ok"
    monkeypatch.setattr(doctor, "_LONGEST_CANCELLING", timedelta(0))
    assert "1 flow run such as stuck stay Cancelling" in found("Prefect hooks").text
    assert "reaper" in found("Prefect hooks").advice
    api.delete_flow_run(flow_run.id)


def test_the_server_is_away_or_not_named() -> None:
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        assert [(each.check, each.state) for each in findings()] == [("Prefect", "error")]
    with temporary_settings({PREFECT_API_URL: None}):
        assert "prefect config set" in findings()[0].advice


def test_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        request = httpx.Request("POST", "http://prefect.test")
        raise httpx.HTTPStatusError("403", request=request, response=httpx.Response(403, request=request))

    monkeypatch.setattr(SyncPrefectClient, "read_work_pools", refused)
    assert "PREFECT_API_KEY" in findings()[-1].advice
    assert findings()[-1].state == "warning"
