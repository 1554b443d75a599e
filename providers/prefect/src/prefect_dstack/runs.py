"""The tasks for existing runs: wait for one, fetch it, stop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from prefect_dstack import _follow
from prefect_dstack._follow import info
from prefect_dstack._job import RunLike, name_of, own, prepare_to_watch
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._names import marker_prefix, task_owner
from prefect_dstack._stop import STOPPING, log_stop
from prefect_dstack.credentials import (
    PATIENT_TIMEOUT,
    CredentialsLike,
    aload,
    load,
    open_async_client,
    open_client,
)

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, Run
    from prefect_dstack._job import Job

_BUDGET = 30.0


@task(cache_policy=NO_CACHE, retries=0)
def wait_for_run(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    artifacts: bool = True,
) -> dict[str, Any]:
    """Wait for the end of a run, relay its log from the first line on, and return its outcome.

    ``run``: what ``submit_run`` or ``get_run`` returned, or a run's name. ``poll_interval``,
    ``retry_budget`` (seconds), ``stream_logs``, ``log_budget_bytes``, ``artifacts``, the outcome and the
    errors are those of ``run_task``. A run that this flow run submitted is stopped when its flow run is
    cancelled, as ``run_task`` does; any other run keeps running. Raises ``RunNotFoundError`` when there is no
    such run.
    """
    job = _job(run, poll_interval, retry_budget, stream_logs, artifacts, log_budget_bytes)

    def body(client: Client) -> dict[str, Any]:
        return _follow.follow(job, _checked(run, _follow.find(job, client), job))

    return _follow.execute_task(job, load(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
async def await_for_run(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    artifacts: bool = True,
) -> dict[str, Any]:
    """Wait for the end of a run and return its outcome: the async twin of ``wait_for_run``."""
    job = _job(run, poll_interval, retry_budget, stream_logs, artifacts, log_budget_bytes)

    async def body(client: AsyncClient) -> dict[str, Any]:
        return await _follow.afollow(job, _checked(run, await _follow.afind(job, client), job))

    return await _follow.aexecute_task(job, await aload(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
def wait_for_service(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 2.0,
    retry_budget: float = 600.0,
) -> str:
    """Wait until a service answers requests and return its address.

    ``run``: what ``submit_run`` returned, or a run's name. ``poll_interval`` and ``retry_budget`` in
    seconds. How long it may take is the task's ``timeout_seconds``. A service that this flow run submitted
    is stopped when its flow run is cancelled meanwhile. Raises the ``RunError`` of a run that ends before,
    ``ConfigurationError`` for a run that is not a service, ``RunNotFoundError`` and the server errors.
    """
    job = _job(run, poll_interval, retry_budget, stream_logs=False, artifacts=False)

    def body(client: Client) -> str:
        found = _checked(run, _follow.find(job, client), job)
        url = found.wait_until_ready(poll_interval=poll_interval, retry_budget=retry_budget, sleep=job.sleep)
        return str(url)

    return _follow.execute_task(job, load(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
async def await_for_service(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 2.0,
    retry_budget: float = 600.0,
) -> str:
    """Wait until a service answers requests: the async twin of ``wait_for_service``."""
    job = _job(run, poll_interval, retry_budget, stream_logs=False, artifacts=False)

    async def body(client: AsyncClient) -> str:
        found = _checked(run, await _follow.afind(job, client), job)
        url = await found.wait_until_ready(
            poll_interval=poll_interval, retry_budget=retry_budget, sleep=job.asleep
        )
        return str(url)

    return await _follow.aexecute_task(job, await aload(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
def get_run(run: RunLike, credentials: CredentialsLike = None) -> dict[str, Any] | None:
    """Fetch a run and return it as ``submit_run`` does; None when there is no such run.

    ``run``: a run's name, or what ``submit_run`` returned. Raises the server errors.
    """
    with open_client(load(credentials), retry_budget=_BUDGET) as client:
        found = client.runs.get(name_of(run))
        return None if found is None or not _is_same(run, found) else info(found)


@task(cache_policy=NO_CACHE, retries=0)
async def aget_run(run: RunLike, credentials: CredentialsLike = None) -> dict[str, Any] | None:
    """Fetch a run: the async twin of ``get_run``."""
    async with open_async_client(await aload(credentials), retry_budget=_BUDGET) as client:
        found = await client.runs.get(name_of(run))
        return None if found is None or not _is_same(run, found) else info(found)


@task(cache_policy=NO_CACHE, retries=0)
def stop_run(
    run: RunLike, credentials: CredentialsLike = None, *, abort: bool = False
) -> dict[str, Any] | None:
    """Stop a run and return it, as ``submit_run`` does; returns once the server shows it stopping.

    ``run``: a run's name, or what ``submit_run`` returned. A missing run (None is returned) and one that has
    ended are no errors. With ``abort`` its processes are killed without a grace period. Raises the server
    errors, such as ``AccessDeniedError`` for a token that may not stop the run.
    """
    with open_client(load(credentials), retry_budget=_BUDGET) as client:
        found = client.runs.get(name_of(run))
        if found is None or not _is_same(run, found):
            return None
        if found.outcome() is None:
            logger = get_run_logger()
            logger.warning(STOPPING, found.name, found.url)
            log_stop(logger, found.stop(abort=abort, until="stopping", timeout=PATIENT_TIMEOUT))
            found.refresh()
        return info(found)


@task(cache_policy=NO_CACHE, retries=0)
async def astop_run(
    run: RunLike, credentials: CredentialsLike = None, *, abort: bool = False
) -> dict[str, Any] | None:
    """Stop a run: the async twin of ``stop_run``."""
    async with open_async_client(await aload(credentials), retry_budget=_BUDGET) as client:
        found = await client.runs.get(name_of(run))
        if found is None or not _is_same(run, found):
            return None
        if found.outcome() is None:
            logger = get_run_logger()
            logger.warning(STOPPING, found.name, found.url)
            log_stop(logger, await found.stop(abort=abort, until="stopping", timeout=PATIENT_TIMEOUT))
            await found.refresh()
        return info(found)


def _job(
    run: RunLike,
    poll_interval: float,
    retry_budget: float,
    stream_logs: bool,
    artifacts: bool,
    log_budget_bytes: int | None = None,
) -> Job:
    job = prepare_to_watch(
        run,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        log_budget_bytes=log_budget_bytes,
        artifacts=artifacts,
        owner=task_owner(),
        logger=get_run_logger(),
    )
    if isinstance(run, Mapping):
        own(job, run.get("marker"), marker_prefix(task_owner()))
    return job


def _is_same(run: RunLike, found: Run | AsyncRun) -> bool:
    """Whether ``found`` is the run that was meant, and not a later one of its name."""
    return not isinstance(run, Mapping) or run.get("run_id") in (None, found.id)


def _checked(run: RunLike, found: Any, job: Job) -> Any:
    from dstack_core import RunNotFoundError

    if found is None or not _is_same(run, found):
        raise RunNotFoundError(f"There is no run {name_of(run)}, or another run has its name now.")
    own(job, found.marker, marker_prefix(task_owner()))
    job.note(found)
    return found
