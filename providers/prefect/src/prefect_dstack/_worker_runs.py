"""The machines of a work pool's flow runs: submit each once, guard it, and find those without a worker.

The problem: several workers serve a pool, any of them may die at any moment, and one that was only slow comes
back.

The idea: a machine's name and marker are made from its flow run alone, so two workers that submit at once get
the same run. Prefect's label of the worker on a flow run names who watches it. A worker claims a flow run
whose worker is not online by writing its own name there, waits ``CLAIM_SECONDS``, and reads whether it is
still there: if two claim at once, the later one has it, and the other sees that. Each worker reads the label
at every check, and leaves a flow run that another one has claimed.

What earlier workers relayed is read back from the flow run's log, and those lines are not relayed again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Container
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import Cancelled

from prefect_dstack._end_reports import StoppingReport
from prefect_dstack._log_relay import client_warnings_in
from prefect_dstack._machine_fallbacks import check_steps, step_of
from prefect_dstack._names import former_machine_name, worker_marker_prefix
from prefect_dstack._secrets import git_credentials_named
from prefect_dstack._worker_evictions import stop_machine, wait_for_end
from prefect_dstack.credentials import aload, aload_git, open_async_client

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State

    from dstack_core import AsyncClient, AsyncRun
    from dstack_core.integration import AttemptNames
    from prefect_dstack._submission import Submission
    from prefect_dstack._worker_variables import DstackJobConfiguration

# A worker has time: an outage of the dstack server of some minutes must not fail the flow run.
SUBMIT_BUDGET = 300.0
# A cancelled flow run that waits for its machine is stopped within two of these; each is one request.
CHECK_SECONDS = 5.0
# Prefect itself ends a cancelled flow run in its machine, within 30 s and a little. A shorter grace cuts off
# the flow's own clean-up, a longer one pays for an idle machine.
GRACE_SECONDS = 60.0
# A flow run that has just changed its state may still be in the hands of its worker. Sooner, it would be
# claimed while that worker submits it; later, its machine is watched by no worker for longer.
SETTLED_SECONDS = 20.0
# As long as a claim of another worker may take to show. With less, two workers may both believe in theirs.
CLAIM_SECONDS = 5.0
# Prefect's workers label the flow runs they submit so.
LABEL = "prefect.worker.name"
_WORKER_LOGGER = "prefect.flow_runs.worker"
# As many as a Prefect server returns at once.
_PAGE = 200


async def submit_once(
    client: AsyncClient,
    flow_run_id: UUID,
    configuration: DstackJobConfiguration,
    logger: Any = None,
    executions: int = 0,
) -> AsyncRun:
    """Return the active run of the flow run, or a new one. Raises ``ConfigurationError``, server errors.

    ``logger`` gets the client's warnings. ``executions`` is how often the flow run was executed before; the
    machines of those executions are waited for.

    Two workers that do this at the same moment get the same run: name and marker are equal (PROTOCOL 1.4).
    """
    from dstack_core import RunNotFoundError

    configuration.check_reach(client.server_url)
    names = configuration.names(flow_run_id)
    active, last = await _known(client, flow_run_id, names)
    if active is not None and active.name in (names.ref(n).name for n in range(1, executions + 1)):
        await wait_for_end(client, active, logger)
        active, last = await _known(client, flow_run_id, names)
    if active is not None:
        return active
    block = await aload(configuration.credentials)
    submission = configuration.submission(await aload_git(block, configuration.git()))
    for warning in submission.warnings if logger is not None else ():
        logger.warning(warning)
    arguments = {
        **submission.arguments,
        **await _options_of_step(client, names, last + 1, configuration, submission),
        "run_name": names.ref(last + 1).name,
        "marker": names.ref(last + 1).marker,
        "retry_budget": SUBMIT_BUDGET,
        "verify_ports": False,
    }
    with git_credentials_named(), client_warnings_in(logger):
        if not submission.code.arguments:
            return await client.runs.submit(submission.configuration, **arguments)
        async with open_async_client(
            block, code=submission.code, tags=configuration.automatic_tags
        ) as with_code:
            await with_code.runs.submit(submission.configuration, **arguments)
    # The run belongs to the client that is closed now.
    run = await client.runs.get(arguments["run_name"], retry_budget=SUBMIT_BUDGET)
    if run is None:
        raise RunNotFoundError(f"Run {arguments['run_name']} was submitted, and deleted a moment later.")
    return run


async def _options_of_step(
    client: AsyncClient,
    names: AttemptNames,
    number: int,
    configuration: DstackJobConfiguration,
    submission: Submission,
) -> dict[str, Any]:
    """Return the options of the fallback that the machine of that number has; none for the first step."""
    ladder = configuration.ladder
    if ladder is None:
        return {}
    check_steps(client, submission, names, ladder["fallbacks"])
    return (await step_of(client, names, number, **ladder)).options


async def find(
    client: AsyncClient, flow_run_id: UUID, configuration: DstackJobConfiguration
) -> AsyncRun | None:
    """Return the flow run's active run, else its last one, else None. Raises the server errors.

    Without any, one with the name that an earlier version gave it is looked up, which takes one request more.
    """
    names = configuration.names(flow_run_id)
    active, last = await _known(client, flow_run_id, names)
    if active is not None or last:
        return active or await client.runs.get(names.ref(last).name)
    number, found = 1, None
    while (former := await client.runs.get(former_machine_name(flow_run_id, number))) is not None:
        number, found = number + 1, former
    return found


def identifier(project: str, run_name: str) -> str:
    """Return how Prefect knows the infrastructure of a flow run."""
    return f"{project}:{run_name}"


async def _known(client: AsyncClient, flow_run_id: UUID, names: AttemptNames) -> tuple[AsyncRun | None, int]:
    """Return the active run, or None, and the highest number in use."""
    prefix = worker_marker_prefix(flow_run_id)
    for run in await client.runs.list():
        if (run.marker or "").startswith(prefix) and run.outcome() is None:
            return run, 0
    number = 0
    while (found := await client.runs.get(names.ref(number + 1).name)) is not None:
        if found.outcome() is None and (found.marker or "").startswith(prefix):
            return found, 0
        number += 1
    return None, number


async def orphans(
    client: PrefectClient, work_pool: str, worker: str, watched: Container[UUID]
) -> list[FlowRun]:
    """Return the active flow runs of the pool that no living worker watches.

    A flow run of this ``worker``'s own name is one too unless it is in ``watched``. Raises what Prefect's
    client raises.
    """
    found = [run for run in await _active(client, work_pool) if run.id not in watched and _is_settled(run)]
    if not found:
        return []
    from prefect.client.schemas.objects import WorkerStatus

    workers = await client.read_workers_for_work_pool(work_pool)
    living = {item.name for item in workers if item.status == WorkerStatus.ONLINE} - {worker}
    return [run for run in found if worker_of(run) not in living]


async def claim(client: PrefectClient, flow_run: FlowRun, worker: str) -> bool:
    """Write on the flow run that ``worker`` watches it; false when another worker did so meanwhile.

    ``flow_run`` is as ``orphans`` returned it. If two do so at once, the later one has it. Raises what
    Prefect's client raises.
    """
    if worker_of(await client.read_flow_run(flow_run.id)) != worker_of(flow_run):
        return False
    await client.update_flow_run_labels(flow_run.id, {LABEL: worker})
    await asyncio.sleep(CLAIM_SECONDS)
    return worker_of(await client.read_flow_run(flow_run.id)) == worker


def worker_of(flow_run: FlowRun) -> str | None:
    """Return the name of the worker that watches the flow run, or None."""
    name = flow_run.labels.get(LABEL)
    return None if name is None else str(name)


async def relayed_lines(client: PrefectClient, flow_run_id: UUID) -> Counter[str]:
    """Return the lines that earlier workers relayed into the flow run's log. Raises the client's errors."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    found: Counter[str] = Counter()
    chosen, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), 0
    while page := await client.read_logs(chosen, limit=_PAGE, offset=offset):
        offset += len(page)
        for log in page:
            if log.name == _WORKER_LOGGER:
                found.update(log.message.split("\n"))
    return found


async def _active(client: PrefectClient, work_pool: str) -> list[FlowRun]:
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    active = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=active))),
            sort=FlowRunSort.ID_DESC,
            limit=_PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < _PAGE:
            return found


def _is_settled(flow_run: FlowRun) -> bool:
    """Whether the flow run is in its state for so long that no worker is working on it."""
    state = flow_run.state
    return state is not None and time.time() - state.timestamp.timestamp() > SETTLED_SECONDS


class HandedOver(Exception):
    """A flow run that another worker has claimed."""


class Guard:
    """The sleep between two polls of a machine, in which it is stopped when its flow run no longer needs it.

    ``api`` is the worker's Prefect client, ``worker`` its name, ``run`` the machine.
    """

    def __init__(
        self,
        api: PrefectClient,
        worker: str,
        flow_run_id: UUID,
        client: AsyncClient,
        run: AsyncRun,
        logger: Any,
    ) -> None:
        self._api = api
        self._worker = worker
        self._flow_run_id = flow_run_id
        self._client = client
        self._run = run
        self._logger = logger
        self._asked_at: float | None = None
        self._ended_since: float | None = None
        self._is_stopped = False

    async def sleep(self, seconds: float) -> None:
        """Sleep at most ``CHECK_SECONDS`` and read the flow run that often.

        Raises ``HandedOver`` when another worker has claimed the flow run: this one was taken for dead, and
        two would relay every line twice.
        """
        await asyncio.sleep(min(seconds, CHECK_SECONDS))
        asked_at = self._asked_at
        if self._is_stopped or (asked_at is not None and time.monotonic() - asked_at < CHECK_SECONDS):
            return
        found = await read_flow_run(self._api, self._flow_run_id)
        now = self._asked_at = time.monotonic()
        if found is not None and worker_of(found) not in (None, self._worker):
            raise HandedOver
        state = end_of(found)
        if found is None or state is None:
            self._ended_since = None
            return
        # Counted from when it was seen: the clocks of the two servers may differ.
        if self._ended_since is None:
            self._ended_since = now
        # A flow that never started has nothing to clean up.
        has_started = found.start_time is not None
        if not has_started or now - self._ended_since >= GRACE_SECONDS:
            await self._stop(state)

    async def _stop(self, state: State[Any]) -> None:
        """Stop the machine; the next sleep repeats a stop that was not confirmed."""
        self._logger.warning("The flow run is %s and no longer needs a machine.", state.name)
        run = self._run
        report = StoppingReport(str(self._flow_run_id), self._logger)
        result = await stop_machine(
            self._client,
            run,
            self._logger,
            reason=f"the flow run is {state.name}",
            backstop="This worker tries again",
            on_accepted=report,
        )
        if not result.is_safe:
            return
        self._is_stopped = True
        report(result)
        if state.is_cancelling():
            await set_cancelled(self._api, self._flow_run_id, "Cancelled before its machine was ready.")


async def read_flow_run(api: PrefectClient, flow_run_id: UUID) -> FlowRun | None:
    """Return the flow run, or None where the Prefect server does not return it."""
    try:
        return await api.read_flow_run(flow_run_id)
    except Exception:
        return None


def end_of(flow_run: FlowRun | None) -> State[Any] | None:
    """Return the state of a flow run that has ended or is about to; None also where it is unknown."""
    state = None if flow_run is None else flow_run.state
    return state if state is not None and (state.is_final() or state.is_cancelling()) else None


async def set_cancelled(api: PrefectClient, flow_run_id: UUID, message: str) -> None:
    """Set the state of a flow run that waits in Cancelling. Raises what Prefect's client raises."""
    await api.set_flow_run_state(flow_run_id, Cancelled(message=message), force=True)
