"""Follow a run to its end, and act when something else ends first; once for blocking code, once for async."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio

from prefect_dstack import _submit
from prefect_dstack._connect import CALL_BUDGET, open_async_client, open_client
from prefect_dstack._probe import StopRequested
from prefect_dstack._secrets import secrets_in
from prefect_dstack._steps import adrive, drive
from prefect_dstack._stop import astop, stop

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, Run
    from prefect_dstack._job import Job
    from prefect_dstack.credentials import DstackCredentials

T = TypeVar("T")

REPORT_SECONDS = 8.0


def submit(job: Job, client: Client) -> Run:
    """Return the job's run, submitted now or by an earlier execution. Raises the server errors."""
    run: Run = drive(_submit.acquire(job.target, job.spec, job.retry_budget, job.logger), client, job.sleep)
    return run


async def asubmit(job: Job, client: AsyncClient) -> AsyncRun:
    """Return the job's run: the twin of ``submit``."""
    run: AsyncRun = await adrive(
        _submit.acquire(job.target, job.spec, job.retry_budget, job.logger), client, job.asleep
    )
    return run


def find(job: Job, client: Client) -> Run | None:
    """Return the run that the job watches, or None. Raises the server errors."""
    name = job.target.attempt.run_name
    run: Run | None = drive(_submit.find(name, job.retry_budget, job.logger), client, job.sleep)
    return run


async def afind(job: Job, client: AsyncClient) -> AsyncRun | None:
    """Return the run that the job watches, or None: the twin of ``find``."""
    name = job.target.attempt.run_name
    run: AsyncRun | None = await adrive(_submit.find(name, job.retry_budget, job.logger), client, job.asleep)
    return run


def follow(job: Job, run: Run) -> dict[str, Any]:
    """Relay the run's events until it is over; return its outcome. Raises the run's and server errors."""
    job.tell_start(run)
    job.relay.hider.add(secrets_in(run.env))
    job.report.start(run)
    for event in run.follow(
        job.relay.progress, poll_interval=job.poll_interval, retry_budget=job.retry_budget, sleep=job.sleep
    ):
        job.relay.handle(event)
        job.report.show(event)
    job.report.end(job.relay.outcome)
    return job.result()


async def afollow(job: Job, run: AsyncRun) -> dict[str, Any]:
    """Relay the run's events until it is over: the twin of ``follow``."""
    await asyncio.to_thread(job.tell_start, run)
    job.relay.hider.add(secrets_in(run.env))
    await asyncio.to_thread(job.report.start, run)
    events = run.follow(
        job.relay.progress, poll_interval=job.poll_interval, retry_budget=job.retry_budget, sleep=job.asleep
    )
    async with aclosing(events):
        async for event in events:
            job.relay.handle(event)
            if job.report.is_shown(event):
                await asyncio.to_thread(job.report.show, event)
    await asyncio.to_thread(job.report.end, job.relay.outcome)
    return job.result()


def execute(job: Job, block: DstackCredentials | None, body: Callable[[Client], T]) -> T:
    """Return what ``body`` does with a client, and stop the run when an interrupt ends it.

    Raises ``StopRequested`` when the flow run was cancelled and no signal told so, else what ``body``
    raises.
    """
    _hide_token(job, block)
    try:
        with open_client(block, retry_budget=min(CALL_BUDGET, job.retry_budget)) as client:
            return body(client)
    except BaseException as error:
        if not job.stops_after(error):
            job.leave(error)
            raise
        try:
            _stop(job, block)
        except BaseException:
            if isinstance(error, StopRequested):
                # The same cancellation came another way while its probe was acted upon.
                _stop(job, block)
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
        async with open_async_client(block, retry_budget=min(CALL_BUDGET, job.retry_budget)) as client:
            return await body(client)
    except BaseException as error:
        if not job.stops_after(error):
            job.leave(error)
            raise
        try:
            await astop(block, job.target, job.relay, job.logger)
        except BaseException:
            if isinstance(error, StopRequested):
                # The same cancellation came another way while its probe was acted upon.
                await astop(block, job.target, job.relay, job.logger)
            raise
        with anyio.move_on_after(REPORT_SECONDS, shield=True):
            await asyncio.to_thread(job.report.end, job.relay.outcome)
        raise
    finally:
        job.probe.close()


def execute_task(job: Job, block: DstackCredentials | None, body: Callable[[Client], T]) -> T:
    """Do as ``execute`` does; a cancellation that no signal told becomes the state the task ends in."""
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
        job.relay.hider.add([block.user_token.get_secret_value()])


def _stop(job: Job, block: DstackCredentials | None) -> None:
    stop(block, job.target, job.relay, job.logger)
    job.report.end(job.relay.outcome)
