"""Follow a run to its end, and stop it when its task ends first: for blocking code and for async."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prefect_dstack._probe import StopRequested
from prefect_dstack._secrets import secrets_in
from prefect_dstack._stop import astop, stop
from prefect_dstack.credentials import CALL_BUDGET, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, Run
    from prefect_dstack._job import Job
    from prefect_dstack.credentials import DstackCredentials

T = TypeVar("T")


def submit(job: Job, client: Client) -> Run:
    """Return the job's run, submitted now or by an earlier execution.

    Raises ``StopRequested`` before anything is submitted for a flow run that was cancelled, and the server
    errors.
    """
    from dstack_core.integration import choose_attempt

    job.page = client.run_url()
    found = choose_attempt(
        client,
        job.names,
        job.attempt,
        retry_budget=job.retry_budget,
        sleep=job.sleep,
        on_event=job.relay.handle_contact,
    )
    job.check_flow_run()
    if found is None:
        with job.submitting():
            found = client.runs.submit(**job.submission(), sleep=job.sleep, on_event=job.relay.handle_contact)
    job.note(found)
    return found


async def asubmit(job: Job, client: AsyncClient) -> AsyncRun:
    """Return the job's run: the twin of ``submit``."""
    from dstack_core.integration import achoose_attempt

    job.page = client.run_url()
    found = await achoose_attempt(
        client,
        job.names,
        job.attempt,
        retry_budget=job.retry_budget,
        sleep=job.asleep,
        on_event=job.relay.handle_contact,
    )
    await asyncio.to_thread(job.check_flow_run)
    if found is None:
        with job.submitting():
            found = await client.runs.submit(
                **job.submission(), sleep=job.asleep, on_event=job.relay.handle_contact
            )
    job.note(found)
    return found


def find(job: Job, client: Client) -> Run | None:
    """Return the run that the job watches, or None. Raises the server errors."""
    return client.runs.get(
        job.attempt.ref.name,
        retry_budget=job.retry_budget,
        sleep=job.sleep,
        on_event=job.relay.handle_contact,
    )


async def afind(job: Job, client: AsyncClient) -> AsyncRun | None:
    """Return the run that the job watches, or None: the twin of ``find``."""
    return await client.runs.get(
        job.attempt.ref.name,
        retry_budget=job.retry_budget,
        sleep=job.asleep,
        on_event=job.relay.handle_contact,
    )


def follow(job: Job, run: Run) -> dict[str, Any]:
    """Relay the run's events until it has ended; return its outcome. Raises the run's and server errors."""
    job.log_start(run)
    job.relay.masker.add(secrets_in(run.env))
    job.report.start(run)
    for event in run.follow(
        job.relay.progress, poll_interval=job.poll_interval, retry_budget=job.retry_budget, sleep=job.sleep
    ):
        job.relay.handle(event)
        job.report.show(event)
    job.report_end()
    return job.result()


async def afollow(job: Job, run: AsyncRun) -> dict[str, Any]:
    """Relay the run's events until it has ended: the twin of ``follow``."""
    await asyncio.to_thread(job.log_start, run)
    job.relay.masker.add(secrets_in(run.env))
    await asyncio.to_thread(job.report.start, run)
    events = run.follow(
        job.relay.progress, poll_interval=job.poll_interval, retry_budget=job.retry_budget, sleep=job.asleep
    )
    async with aclosing(events):
        async for event in events:
            job.relay.handle(event)
            if job.report.is_shown(event):
                await asyncio.to_thread(job.report.show, event)
    await asyncio.to_thread(job.report_end)
    return job.result()


def execute(job: Job, block: DstackCredentials | None, body: Callable[[Client], T]) -> T:
    """Return what ``body`` does with a client, and stop the run when an interrupt ends it.

    Raises ``StopRequested`` when the flow run was cancelled and no signal reached the task, else what
    ``body`` raises.
    """
    _hide_token(job, block)
    try:
        with open_client(block, retry_budget=min(CALL_BUDGET, job.retry_budget), code=job.code) as client:
            return body(client)
    except BaseException as error:
        if not job.stops_after(error):
            job.leave(error)
            raise
        allowed = job.time_to_stop(error)
        try:
            stop(job, block, allowed, job.reason_to_stop(error))
        except BaseException:
            if isinstance(error, StopRequested):
                # The signal of the same cancellation interrupted the stop.
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
        async with open_async_client(
            block, retry_budget=min(CALL_BUDGET, job.retry_budget), code=job.code
        ) as client:
            return await body(client)
    except BaseException as error:
        if not job.stops_after(error):
            job.leave(error)
            raise
        allowed = job.time_to_stop(error)
        try:
            await astop(job, block, allowed, job.reason_to_stop(error))
        except BaseException:
            if isinstance(error, StopRequested):
                # The signal of the same cancellation interrupted the stop.
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
        return cast("T", job.cancelled(request))


async def aexecute_task(
    job: Job, block: DstackCredentials | None, body: Callable[[AsyncClient], Awaitable[T]]
) -> T:
    """Do as ``aexecute`` does: the twin of ``execute_task``."""
    try:
        return await aexecute(job, block, body)
    except StopRequested as request:
        return cast("T", job.cancelled(request))


def _hide_token(job: Job, block: DstackCredentials | None) -> None:
    if block is not None:
        job.relay.masker.add([block.user_token.get_secret_value()])


def info(run: Run | AsyncRun) -> dict[str, Any]:
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
