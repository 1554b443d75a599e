"""``fallbacks`` of a work pool: the next machine of a flow run has other options than the one that was lost."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Completed, Crashed, Pending, Running

import dstack_core as core
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackWorker, _bundles
from prefect_dstack._secrets import GitLogin
from prefect_dstack._worker_variables import DstackJobConfiguration

from .machines import START_SECONDS, deploy, new_pool, start, the_line, worker
from .support import all_runs, outcome_of, state_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_server")]

LADDER: list[dict[str, Any]] = [{"spot_policy": "on-demand"}, {"spot_policy": "on-demand", "max_price": 50.0}]


@pytest.fixture
def pool() -> str:
    """Create a work pool for one test."""
    return new_pool()


def configuration(credentials: DstackCredentials, command: str, **variables: Any) -> DstackJobConfiguration:
    return DstackJobConfiguration(
        credentials=credentials,
        command=command,
        # Without the reschedule that Prefect's variable asks for, what follows is that of the fallbacks.
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"]},
        poll_interval=0.2,
        **{"spot_policy": "spot", "fallbacks": LADDER, **variables},
    )


def executed(pool: str, flow_run: FlowRun, made: DstackJobConfiguration, *states: Any) -> list[int]:
    """Let a worker execute a flow run once for each state, which it gets once its machine is there."""

    async def go() -> list[int]:
        codes = []
        async with DstackWorker(work_pool_name=pool) as machines:
            for number, state in enumerate(states, 1):
                again = await machines.client.read_flow_run(flow_run.id)
                await machines.client.set_flow_run_state(flow_run.id, Pending(), force=True)
                watching = asyncio.create_task(machines.run(again, made))
                await asyncio.to_thread(until, lambda number=number: len(machines_of(made)) == number)
                await machines.client.set_flow_run_state(flow_run.id, state, force=True)
                codes.append((await asyncio.wait_for(watching, 60)).status_code)
                await asyncio.gather(*machines._background)
        return codes

    return asyncio.run(go())


def machines_of(made: DstackJobConfiguration) -> list[Any]:
    assert isinstance(made.credentials, DstackCredentials)
    with made.credentials.get_client() as client:
        return client.runs.list(all=True)


def spot_policies(dstack: LocalServer) -> list[Any]:
    return [run.configuration.get("spot_policy") for run in dstack.runs]


@pytest.mark.matrix
def test_a_flow_run_completes_on_the_machine_of_a_fallback(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    dstack.scenarios.interrupt_after(0, noticed_after=0)
    with get_client(sync_client=True) as client:
        deployment = deploy(pool, spot_policy="spot", fallbacks=LADDER)
        flow_run = client.create_flow_run_from_deployment(deployment)
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
        assert the_line(flow_run, "by-print-2", "by-print-2") == 1
    assert state_of(flow_run.id).is_completed(), (tmp_path / "log").read_text()[-3000:]
    assert spot_policies(dstack) == ["spot", "on-demand"]


def test_each_lost_machine_leads_to_the_next_fallback_and_the_last_to_the_end(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    flow_run = start(deploy(pool))
    dstack.scenarios.interrupt_after(0.2, noticed_after=0)
    dstack.scenarios.lose_machine(0.2, times=2, noticed_after=0)
    made = configuration(credentials, "sleep 60")
    assert executed(pool, flow_run, made, Running(), Crashed(), Running()) == [0, 0, 1]
    assert spot_policies(dstack) == ["spot", "on-demand", "on-demand"]
    assert [run.configuration.get("max_price") for run in dstack.runs] == [None, None, 50.0]
    assert "another machine: step 2 of 3, with spot_policy=on-demand" in caplog.text
    with get_client(sync_client=True) as client:
        names = [state.name for state in client.read_flow_run_states(flow_run.id)]
    assert names.count("AwaitingRetry") == 2


def test_a_flow_run_that_gets_no_machine_is_scheduled_again(
    pool: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """It has not begun: its state is Pending."""
    flow_run = start(deploy(pool))
    made = configuration(credentials, "true", max_price=0.001, fallbacks=[{"max_price": None}])
    assert executed(pool, flow_run, made, Pending()) == [0]
    assert state_of(flow_run.id).name == "AwaitingRetry"
    with get_client(sync_client=True) as client:
        again = client.read_flow_run(flow_run.id)

    async def go() -> int:
        async with DstackWorker(work_pool_name=pool) as machines:
            await machines.client.set_flow_run_state(flow_run.id, Pending(), force=True)
            return (await machines.run(again, made)).status_code

    assert asyncio.run(go()) == 0
    assert [run.configuration.get("max_price") for run in dstack.runs] == [0.001, None]
    assert [run.status for run in dstack.runs] == ["failed", "done"]


@pytest.mark.parametrize("status", [137, 3])
def test_an_exit_status_of_the_machine_leads_on_if_it_is_named(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, status: int
) -> None:
    flow_run = start(deploy(pool))
    made = configuration(credentials, f"sleep 0.5; exit {status}", fallback_on_exit={"137": 3})
    assert executed(pool, flow_run, made, Running()) == ([0] if status == 137 else [status])
    assert (state_of(flow_run.id).name == "AwaitingRetry") == (status == 137)


# The worker may stop the machine and set Cancelled before the interruption, or see the interruption first.
@pytest.mark.parametrize(
    ("state", "ends"), [(Cancelling(), ("Cancelled", "Cancelling")), (Completed(), ("Completed",))]
)
def test_a_flow_run_that_has_ended_gets_no_further_machine(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, state: Any, ends: tuple[str, ...]
) -> None:
    flow_run = start(deploy(pool))
    # Long enough for the state to be set first, on a busy machine, too.
    dstack.scenarios.interrupt_after(4, noticed_after=0)
    assert executed(pool, flow_run, configuration(credentials, "sleep 60"), state) == [0]
    assert state_of(flow_run.id).name in ends
    assert len(dstack.runs) == 1


def test_max_cost_is_for_all_machines(pool: str, dstack: LocalServer, credentials: DstackCredentials) -> None:
    flow_run = start(deploy(pool))
    dstack.scenarios.interrupt_after(0.5, noticed_after=0)
    made = configuration(credentials, "sleep 1", max_cost=20.0)
    assert executed(pool, flow_run, made, Running(), Running())[0] == 0
    first, second = (float(run.env["DSTACK_MAX_COST"]) for run in sorted(machines_of(made), key=_number))
    assert first == 20.0
    assert second == pytest.approx(20.0 - outcome_of(all_runs(dstack)[0]).cost)
    assert second < 20.0


def _number(run: Any) -> int:
    return int(run.marker.rpartition("/")[2])


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"fallbacks": [{"env": {"A": "1"}}]},
            r"^fallbacks\[0\]: expected options that choose .*, got 'env'",
        ),
        ({"fallbacks": [{"spot_policy": "cheap"}]}, r"^fallbacks\[0\]: spot_policy: expected"),
        ({"fallbacks": None, "fallback_on_exit": {"137": "next"}}, "^fallback_on_exit: expected fallbacks"),
    ],
)
def test_wrong_fallbacks_submit_no_machine(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, variables: Any, text: str
) -> None:
    flow_run, made = start(deploy(pool)), configuration(credentials, "true", **variables)

    async def go() -> None:
        async with DstackWorker(work_pool_name=pool) as machines:
            await machines.run(flow_run, made)

    with pytest.raises(core.ConfigurationError, match=text):
        asyncio.run(go())
    assert dstack.runs == []


def test_a_bundle_goes_to_one_machine(credentials: DstackCredentials) -> None:
    """The work pool may have fallbacks for its other flow runs."""
    deployed, of_dstack = configuration(credentials, "true"), configuration(credentials, "true")
    of_dstack._bundle_is = _bundles.IN_ARTIFACT
    assert deployed.ladder is not None
    assert deployed.submission(GitLogin()).warnings == []
    assert of_dstack.ladder is None
    (warning,) = of_dstack.submission(GitLogin()).warnings
    assert warning.startswith("fallbacks: not used for a flow of @dstack")
