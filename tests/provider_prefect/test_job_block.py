"""The block of a run: trigger, wait, fetch, stop; sync and async."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import httpx
import pytest
from prefect import flow, task
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.testing.standard_test_suites import BlockStandardTestSuite  # type: ignore[attr-defined]
from pydantic import ValidationError

from dstack_core import RunFailedError, RunNotFoundError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackRun, _cancellation

from .support import (
    all_runs,
    cancelled_when,
    interrupt_when_asked,
    is_running,
    log_records,
    outcome_of,
    submissions,
    the_run,
    until,
)

LONG = {"type": "task", "commands": ["echo started; sleep 60"]}
SHORT = {"type": "task", "commands": ["echo the-end"]}


def block(credentials: DstackCredentials, configuration: dict[str, Any], **fields: Any) -> DstackRun:
    return DstackRun(credentials=credentials, configuration=configuration, poll_interval=0.1, **fields)


class TestStandard(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return DstackRun

    # The suite's own test of the logo fetches it from the internet.
    def test_has_a_valid_image(self, block: type[Block]) -> None:
        assert str(block._logo_url).startswith("https://")


def test_a_configuration_that_no_server_takes_is_refused(credentials: DstackCredentials) -> None:
    with pytest.raises(ValidationError, match="commands"):
        block(credentials, {"type": "task", "commands": 3})


@pytest.mark.usefixtures("prefect_server")
def test_both_blocks_are_registered_from_the_command_line() -> None:
    subprocess.run([sys.executable, "-m", "prefect", "block", "register", "-m", "prefect_dstack"], check=True)
    with get_client(sync_client=True) as client:
        known = {kind.slug for kind in client.read_block_types()}
    assert {"dstack-credentials", "dstack-run"} <= known


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_runs_in_a_flow(dstack: LocalServer, credentials: DstackCredentials) -> None:
    credentials.save("for-the-run", overwrite=True)
    block(credentials, SHORT).save("short-run", overwrite=True)

    @flow
    def running() -> tuple[Any, Any]:
        handle = DstackRun.load("short-run").trigger()  # type: ignore[union-attr]
        handle.wait_for_completion()
        handle.wait_for_completion()
        return flow_run.id, handle.fetch_result()

    flow_run_id, outcome = running()
    assert outcome == outcome_of(the_run(dstack)).to_dict()
    assert "the-end" in log_records(flow_run_id, last="the-end")


@pytest.mark.usefixtures("prefect_server")
def test_the_async_twins_run_in_an_async_flow(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def running() -> Any:
        handle = await block(credentials, SHORT).atrigger()
        await handle.await_for_completion()
        return await handle.afetch_result()

    assert asyncio.run(running()) == outcome_of(the_run(dstack)).to_dict()


@pytest.mark.usefixtures("prefect_server")
def test_the_sync_methods_stay_sync_in_an_async_flow(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    async def running() -> str:
        handle = block(credentials, SHORT).trigger()
        handle.wait_for_completion()
        return str(handle.fetch_result()["run_id"])

    assert asyncio.run(running()) == the_run(dstack).id


def test_no_flow_is_needed_and_a_handle_survives_pickling(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    handle = block(credentials, SHORT).trigger()
    copy = cloudpickle.loads(cloudpickle.dumps(handle))
    copy.wait_for_completion()
    assert copy.fetch_result() == handle.fetch_result()
    assert block(credentials, SHORT).trigger().run_id != handle.run_id
    assert handle.url.startswith(dstack.url)
    assert handle.service_url is None


def test_a_failed_run_raises_with_its_last_lines(credentials: DstackCredentials) -> None:
    handle = block(credentials, {"type": "task", "commands": ["echo no memory", "exit 7"]}).trigger()
    with pytest.raises(RunFailedError, match="status 7") as caught:
        handle.wait_for_completion()
    assert caught.value.last_lines == ("no memory",)
    with pytest.raises(RunFailedError, match="status 7"):
        handle.fetch_result()


def test_a_run_always_has_a_longest_duration(dstack: LocalServer, credentials: DstackCredentials) -> None:
    handle = block(credentials, SHORT).trigger()
    reply = httpx.post(
        f"{dstack.url}/api/project/{dstack.project}/runs/get",
        headers={"Authorization": f"Bearer {dstack.token}"},
        json={"run_name": handle.run_name},
    )
    assert reply.json()["run_spec"]["configuration"]["max_duration"] == 24 * 3600


@pytest.mark.parametrize("twin", [False, True])
def test_a_running_run_is_stopped(dstack: LocalServer, credentials: DstackCredentials, twin: bool) -> None:
    handle = block(credentials, LONG).trigger()
    with pytest.raises(RuntimeError, match="has not ended"):
        asyncio.run(handle.afetch_result()) if twin else handle.fetch_result()
    asyncio.run(handle.astop()) if twin else handle.stop()
    until(lambda: the_run(dstack).outcome(), seconds=20)
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


def test_another_run_of_the_same_name_is_not_mistaken_for_it(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    handle = block(credentials, SHORT, run_name="again").trigger()
    handle.wait_for_completion()
    handle._outcome = None
    with dstack.client() as client:
        client.runs.submit(SHORT, run_name="again")
    with pytest.raises(RunNotFoundError, match="again"):
        handle.fetch_result()


@pytest.mark.usefixtures("prefect_server")
def test_equal_triggers_have_runs_of_their_own_and_a_retried_flow_finds_them_again(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    attempts: list[list[str]] = []

    @task
    def two() -> list[str]:
        handles = [block(credentials, SHORT).trigger() for _ in range(2)]
        for handle in handles:
            handle.wait_for_completion()
        return [handle.run_id for handle in handles]

    @flow(retries=1, retry_delay_seconds=0)
    def running() -> None:
        handle = block(credentials, SHORT).trigger()
        handle.wait_for_completion()
        attempts.append([handle.run_id, *two()])
        if len(attempts) == 1:
            raise RuntimeError("something else failed")

    running()
    assert attempts[0] == attempts[1]
    assert len(set(attempts[0])) == len(all_runs(dstack)) == submissions(dstack) == 3


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("twin", [False, True])
def test_an_interrupt_while_waiting_stops_the_run(
    dstack: LocalServer, credentials: DstackCredentials, twin: bool
) -> None:
    @flow
    def waiting() -> None:
        block(credentials, LONG).trigger().wait_for_completion()

    @flow
    async def awaiting() -> None:
        await (await block(credentials, LONG).atrigger()).await_for_completion()

    thread = interrupt_when_asked(dstack)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(awaiting()) if twin else waiting()
    thread.join()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert sum(request.path.endswith("/runs/stop") for request in dstack.requests) == 1


@pytest.mark.usefixtures("prefect_server")
def test_a_cancellation_that_sends_no_signal_stops_the_run_and_starts_no_retry(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    ids: list[Any] = []

    @task(retries=2, retry_delay_seconds=0)
    def waiting() -> None:
        block(credentials, LONG).trigger().wait_for_completion()

    @flow
    def cancelled() -> None:
        ids.append(flow_run.id)
        waiting.submit().wait()

    with (
        cancelled_when(lambda: is_running(dstack), ids),
        pytest.raises(_cancellation.StopRequested, match="was cancelled"),
    ):
        cancelled()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert submissions(dstack) == 1
