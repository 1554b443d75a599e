"""Submit or find a run, follow it to its end, and stop it when its task ends first: blocking and async.

Each function has an async twin with ``a`` before its name. The decisions that both share are in ``Job`` and
``_stop``; this file contains only what waits. In async code, requests to the Prefect server run in a thread,
because its client blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prefect.states import Cancelled

from prefect_dstack._cancellation import StopRequested
from prefect_dstack._stop import (
    BACKSTOP,
    astop,
    log_left_running,
    must_stop,
    reason_to_stop,
    stop,
    time_to_stop,
)
from prefect_dstack._tags import tags_of_task
from prefect_dstack.credentials import CALL_BUDGET, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, OutcomeDict, Run
    from prefect_dstack._fallback_steps import JobSteps
    from prefect_dstack._job import Job
    from prefect_dstack.credentials import DstackCredentials
    from prefect_dstack.run_dict import RunDict

T = TypeVar("T")


def submit(job: Job, client: Client) -> Run:
    """Return the job's run, submitted now or by an earlier execution.

    Raises ``StopRequested`` before anything is submitted for a flow run that was cancelled, and the server
    errors.
    """
    from dstack_core.integration import choose_attempt

    # Until the run is known, the list of runs is the page to name.
    job.page = client.run_url()
    job.check_steps(client)
    found = choose_attempt(
        client,
        job.names,
        job.attempt,
        fallbacks=job.fallbacks,
        max_cost=job.spec.get("max_cost"),
        retry_budget=job.retry_budget,
        sleep=job.sleep,
        on_event=job.relay.handle_contact,
    )
    if job.steps is not None:
        for ref in job.steps.start():
            earlier = client.runs.get(ref.name, retry_budget=job.retry_budget, sleep=job.sleep)
            job.steps.add_earlier(ref, earlier)
    # As late as possible: the choice above may have waited for a run that is stopping.
    job.check_flow_run()
    if found is not None:
        return job.noted(found, client.project)
    if job.steps is not None:
        job.steps.log_next()
    return _submit_now(job, client)


def _submit_now(job: Job, client: Client) -> Run:
    with job.packed() as arguments, job.submitting():
        found = client.runs.submit(**arguments, sleep=job.sleep, on_event=job.relay.handle_contact)
    return job.noted(found, client.project)


async def asubmit(job: Job, client: AsyncClient) -> AsyncRun:
    """Return the job's run: the twin of ``submit``."""
    from dstack_core.integration import achoose_attempt

    job.page = client.run_url()
    job.check_steps(client)
    found = await achoose_attempt(
        client,
        job.names,
        job.attempt,
        fallbacks=job.fallbacks,
        max_cost=job.spec.get("max_cost"),
        retry_budget=job.retry_budget,
        sleep=job.asleep,
        on_event=job.relay.handle_contact,
    )
    if job.steps is not None:
        for ref in job.steps.start():
            found_earlier = await client.runs.get(ref.name, retry_budget=job.retry_budget, sleep=job.asleep)
            job.steps.add_earlier(ref, found_earlier)
    await asyncio.to_thread(job.check_flow_run)
    if found is not None:
        return job.noted(found, client.project)
    if job.steps is not None:
        job.steps.log_next()
    return await _asubmit_now(job, client)


async def _asubmit_now(job: Job, client: AsyncClient) -> AsyncRun:
    with job.packed() as arguments, job.submitting():
        found = await client.runs.submit(**arguments, sleep=job.asleep, on_event=job.relay.handle_contact)
    return job.noted(found, client.project)


def submit_only(job: Job, client: Client) -> Run:
    """Return the job's run as ``submit`` does, once its callbacks have returned: nothing follows it here."""
    run = submit(job, client)
    for pause in job.pauses():
        job.sleep(pause)
    return run


async def asubmit_only(job: Job, client: AsyncClient) -> AsyncRun:
    """Return the job's run: the twin of ``submit_only``."""
    run = await asubmit(job, client)
    for pause in job.pauses():
        await job.asleep(pause)
    return run


def find(job: Job, client: Client) -> Run | None:
    """Return the run that the job watches, or None. Raises the server errors."""
    found = client.runs.get(
        job.attempt.ref.name,
        retry_budget=job.retry_budget,
        sleep=job.sleep,
        on_event=job.relay.handle_contact,
    )
    job.note_found(found, client.project)
    return found


async def afind(job: Job, client: AsyncClient) -> AsyncRun | None:
    """Return the run that the job watches, or None: the twin of ``find``."""
    found = await client.runs.get(
        job.attempt.ref.name,
        retry_budget=job.retry_budget,
        sleep=job.asleep,
        on_event=job.relay.handle_contact,
    )
    job.note_found(found, client.project)
    return found


def find_newest(job: Job, client: Client) -> Run | None:
    """Return the run of the newest step of the job that is watched, or None. Raises the server errors."""
    from dstack_core.integration import newest_step

    job.check_steps(client)
    first = job.attempt.first
    if job.steps is not None and job.fallbacks is not None and first is not None:
        options: Any = {"retry_budget": job.retry_budget, "sleep": job.sleep}
        job.steps.found(newest_step(client, first, job.fallbacks, **options))
        for ref in job.steps.start():
            job.steps.add_earlier(ref, client.runs.get(ref.name, **options))
    return find(job, client)


async def afind_newest(job: Job, client: AsyncClient) -> AsyncRun | None:
    """Return the run of the newest step: the twin of ``find_newest``."""
    from dstack_core.integration import anewest_step

    job.check_steps(client)
    first = job.attempt.first
    if job.steps is not None and job.fallbacks is not None and first is not None:
        options: Any = {"retry_budget": job.retry_budget, "sleep": job.asleep}
        job.steps.found(await anewest_step(client, first, job.fallbacks, **options))
        for ref in job.steps.start():
            job.steps.add_earlier(ref, await client.runs.get(ref.name, **options))
    return await afind(job, client)


def follow(job: Job, client: Client, run: Run) -> OutcomeDict:
    """Relay the run's events until it has ended; return its outcome. Raises the run's and server errors."""
    watch(job, client, run)
    return job.result()


def watch(job: Job, client: Client, run: Run) -> Run:
    """Relay the events of the run and of those of further steps until the last has ended; return that one.

    Raises the server errors.
    """
    if job.steps is not None:
        _relay_earlier(job, job.steps)
    _watch_run(job, run)
    while job.steps is not None and job.steps.has_next:
        following = _submit_next(job, client, job.steps)
        if following is None:
            break
        run = following
        _watch_run(job, run)
    job.report_end()
    for pause in job.pauses():
        job.sleep(pause)
    return run


def _relay_earlier(job: Job, steps: JobSteps) -> None:
    for run in steps.runs_to_relay():
        for event in run.follow(
            retry_budget=job.retry_budget, sleep=job.sleep, timestamps=job.log_timestamps, utilization=True
        ):
            steps.take_earlier(event)


def _submit_next(job: Job, client: Client, steps: JobSteps) -> Run | None:
    """Return the run of the next step; None if ``max_cost`` pays for none."""
    from dstack_core import ConfigurationError

    steps.show_end()
    job.check_flow_run()
    steps.begin()
    try:
        return _submit_now(job, client)
    except ConfigurationError as error:
        steps.refused(error)
        return None


def _watch_run(job: Job, run: Run) -> None:
    job.log_start(run)
    job.hide_env(run)
    job.report.start(run)
    for event in run.follow(
        job.relay.progress,
        poll_interval=job.poll_interval,
        retry_budget=job.retry_budget,
        sleep=job.sleep,
        report_limits=job.report_limits,
        timestamps=job.log_timestamps,
        utilization=True,
    ):
        job.handle(event)
        job.report.show(event)


async def afollow(job: Job, client: AsyncClient, run: AsyncRun) -> OutcomeDict:
    """Relay the run's events until it has ended: the twin of ``follow``."""
    await awatch(job, client, run)
    return job.result()


async def awatch(job: Job, client: AsyncClient, run: AsyncRun) -> AsyncRun:
    """Relay the events until the run of the last step has ended: the twin of ``watch``."""
    if job.steps is not None:
        await _arelay_earlier(job, job.steps)
    await _awatch_run(job, run)
    while job.steps is not None and job.steps.has_next:
        following = await _asubmit_next(job, client, job.steps)
        if following is None:
            break
        run = following
        await _awatch_run(job, run)
    await asyncio.to_thread(job.report_end)
    for pause in job.pauses():
        await job.asleep(pause)
    return run


async def _arelay_earlier(job: Job, steps: JobSteps) -> None:
    runs = steps.runs_to_relay()
    # Each step of the iterator asks the Prefect server for the log.
    while (run := await asyncio.to_thread(next, runs, None)) is not None:
        events = run.follow(
            retry_budget=job.retry_budget, sleep=job.asleep, timestamps=job.log_timestamps, utilization=True
        )
        async with aclosing(events):
            async for event in events:
                steps.take_earlier(event)


async def _asubmit_next(job: Job, client: AsyncClient, steps: JobSteps) -> AsyncRun | None:
    from dstack_core import ConfigurationError

    await asyncio.to_thread(steps.show_end)
    await asyncio.to_thread(job.check_flow_run)
    steps.begin()
    try:
        return await _asubmit_now(job, client)
    except ConfigurationError as error:
        steps.refused(error)
        return None


async def _awatch_run(job: Job, run: AsyncRun) -> None:
    await asyncio.to_thread(job.log_start, run)
    job.hide_env(run)
    await asyncio.to_thread(job.report.start, run)
    events = run.follow(
        job.relay.progress,
        poll_interval=job.poll_interval,
        retry_budget=job.retry_budget,
        sleep=job.asleep,
        report_limits=job.report_limits,
        timestamps=job.log_timestamps,
        utilization=True,
    )
    async with aclosing(events):
        async for event in events:
            job.handle(event)
            if job.report.is_shown(event):
                await asyncio.to_thread(job.report.show, event)


def execute(job: Job, block: DstackCredentials | None, body: Callable[[Client], T]) -> T:
    """Return what ``body`` does with a client, and stop the run when an interrupt ends it.

    Raises ``StopRequested`` when the flow run was cancelled and no signal reached the task, else what
    ``body`` raises.
    """
    _hide_token(job, block)
    try:
        budget = min(CALL_BUDGET, job.retry_budget)
        tags = tags_of_task() if job.spec else {}
        with open_client(block, retry_budget=budget, code=job.code, tags=tags) as client:
            return body(client)
    except BaseException as error:
        if not must_stop(job, error):
            log_left_running(job, error)
            raise
        allowed = time_to_stop(job, error)
        try:
            stop(job, block, allowed, reason_to_stop(job, error))
        except BaseException:
            # A cancellation may come twice: from the probe and, while the run is being stopped, as a signal.
            if isinstance(error, StopRequested):
                stop(job, block, allowed, error.reason)
            raise
        raise
    finally:
        job.probe.close()


async def aexecute(
    job: Job, block: DstackCredentials | None, body: Callable[[AsyncClient], Awaitable[T]]
) -> T:
    """Return what ``body`` does with a client: the twin of ``execute``."""
    _hide_token(job, block)
    try:
        budget = min(CALL_BUDGET, job.retry_budget)
        tags = await asyncio.to_thread(tags_of_task) if job.spec else {}
        async with open_async_client(block, retry_budget=budget, code=job.code, tags=tags) as client:
            return await body(client)
    except BaseException as error:
        if not must_stop(job, error):
            log_left_running(job, error)
            raise
        allowed = time_to_stop(job, error)
        try:
            await astop(job, block, allowed, reason_to_stop(job, error))
        except BaseException:
            # A cancellation may come twice: from the probe and, while the run is being stopped, as a signal.
            if isinstance(error, StopRequested):
                await astop(job, block, allowed, error.reason)
            raise
        raise
    finally:
        job.probe.close()


def execute_task(job: Job, block: DstackCredentials | None, body: Callable[[Client], T]) -> T:
    """Do as ``execute`` does; a cancellation that no signal announced becomes the state the task ends in."""
    try:
        return execute(job, block, body)
    except StopRequested as request:
        return cast("T", cancelled_state(job, request))


async def aexecute_task(
    job: Job, block: DstackCredentials | None, body: Callable[[AsyncClient], Awaitable[T]]
) -> T:
    """Do as ``aexecute`` does: the twin of ``execute_task``."""
    try:
        return await aexecute(job, block, body)
    except StopRequested as request:
        return cast("T", cancelled_state(job, request))


def cancelled_state(job: Job, request: StopRequested) -> Any:
    """Return the state for a task that was cancelled without a signal.

    A state is returned because an exception would make Prefect start the task's next retry.
    """
    name = job.attempt.ref.name
    if not job.may_exist:
        done = f"Run {name} was not submitted."
    elif must_stop(job, request):
        done = _stop_in_words(job)
    else:
        done = f"Run {name} keeps running."
    reason = f"{request.reason[:1].upper()}{request.reason[1:]}"
    return Cancelled(message=f"{reason}. {done}")


def _stop_in_words(job: Job) -> str:
    """Return what is known of the run after its stop."""
    from dstack_core.integration import StopResult, StopState, describe_end, describe_stop

    if job.relay.outcome is not None:
        return describe_end(job.relay.outcome)
    name = job.attempt.ref.name
    result = job.stopped or StopResult(name, job.page, StopState.UNCONFIRMED, 0, "see the log")
    return describe_stop(result, backstop=BACKSTOP)


def _hide_token(job: Job, block: DstackCredentials | None) -> None:
    if block is not None:
        job.relay.masker.add([block.user_token.get_secret_value()])


def info(run: Run | AsyncRun) -> RunDict:
    """Return the run as of the last poll; makes no request."""
    from dstack_core.integration import outcome_dict

    outcome = run.outcome()
    return {
        "run_name": run.name,
        "run_id": run.id,
        "status": str(run.last_status),
        "url": run.url,
        "service_url": run.service_url,
        "marker": run.marker,
        "outcome": None if outcome is None else outcome_dict(outcome),
    }


def with_masking(run: Run | AsyncRun, job: Job) -> RunDict:
    """Return the run as of the last poll, with what its values are masked by; makes no request."""
    masking = job.masking.to_dict()
    return {**info(run), "mask_env": masking["mask_env"], "secret_names": masking["secret_names"]}
