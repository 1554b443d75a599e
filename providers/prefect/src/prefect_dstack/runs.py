"""The tasks for existing runs: wait for a run or a service, fetch a run, stop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from prefect_dstack import _follow
from prefect_dstack._checks import check_switches
from prefect_dstack._follow import info
from prefect_dstack._job import RunLike, name_of, own, prepare_to_watch
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._names import marker_prefix, task_owner
from prefect_dstack._secrets import Masking
from prefect_dstack._stop import STOPPING, log_stop
from prefect_dstack.credentials import (
    PATIENT_TIMEOUT,
    CredentialsLike,
    aload,
    load,
    open_async_client,
    open_client,
)
from prefect_dstack.retry_conditions import is_below_cost_limit

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, CallbacksLike, Client, OutcomeDict, Run
    from dstack_core.integration import MaskEnv
    from prefect_dstack._job import Job
    from prefect_dstack.run_dict import RunDict

# For the tasks that wait for nothing but a reply; a longer outage fails the task, which may have retries.
_BUDGET = 30.0


@task(cache_policy=NO_CACHE, retries=0, retry_condition_fn=is_below_cost_limit)
def wait_for_run(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    mask_env: MaskEnv | None = None,
) -> OutcomeDict:
    """Wait for the end of a run, relay its log from the first line on, and return its outcome.

    A run that this flow run submitted is stopped when its flow run is cancelled, as ``run_task`` does; any
    other run keeps running.

    Args:
        run: What ``submit_run`` or ``get_run`` returned, or a run's name.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        poll_interval: Seconds between two status requests. Default: 5.
        retry_budget: Seconds to keep retrying an unreachable server; the run keeps running meanwhile.
            Default: 600.
        stream_logs: Send the log lines to the run logger. Default: True.
        log_budget_bytes: How many bytes of log to send, in whole lines; None sends all. Default: 10 MB.
        log_timestamps: Begin each line with the time at which the server logged it. Default: False.
        artifacts: Show the run in the flow run's artifacts: its page, its progress, its outcome, and what it
            reports. Default: True.
        callbacks: What is called while the run is followed, as for ``run_task``, ``on_submitted`` excepted.
            Default: none.
        mask_env: Which values of the run's environment are masked, as for ``run_task``. Of a run that is
            given by name, values of secrets are known only by their names. Default: None, as the run was
            submitted with ``submit_run``, else ``"secrets"``.

    Returns:
        The fields of ``dstack_core.Outcome`` as a dict of JSON-plain values, as ``run_task`` does.

    Raises:
        ConfigurationError: A value is wrong.
        RunNotFoundError: There is no such run, or another run has its name now.
        RunFailedError, NoCapacityError, RunStoppedError: The run's end, with its exit status and the last log
            lines.
        ServerError: The other server errors, which leave the run alone.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Task
        from prefect_dstack import submit_run, wait_for_run


        @flow
        def train() -> dict:
            run = submit_run(Task(commands=["python train.py"]))
            return wait_for_run(run, poll_interval=10)
        ```
    """
    job = _job(
        run,
        poll_interval,
        retry_budget,
        stream_logs,
        artifacts,
        log_budget_bytes,
        log_timestamps,
        mask_env,
        callbacks,
    )

    def body(client: Client) -> OutcomeDict:
        return _follow.follow(job, client, _checked(run, _follow.find(job, client), job, mask_env))

    return _follow.execute_task(job, load(credentials), body)


@task(cache_policy=NO_CACHE, retries=0, retry_condition_fn=is_below_cost_limit)
async def await_for_run(
    run: RunLike,
    credentials: CredentialsLike = None,
    *,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    mask_env: MaskEnv | None = None,
) -> OutcomeDict:
    """Wait for the end of a run and return its outcome: the async twin of ``wait_for_run``.

    Parameters, outcome and errors are the same.
    """
    job = _job(
        run,
        poll_interval,
        retry_budget,
        stream_logs,
        artifacts,
        log_budget_bytes,
        log_timestamps,
        mask_env,
        callbacks,
    )

    async def body(client: AsyncClient) -> OutcomeDict:
        found = _checked(run, await _follow.afind(job, client), job, mask_env)
        return await _follow.afollow(job, client, found)

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

    How long it may take is the task's ``timeout_seconds``. A service that this flow run submitted is stopped
    when its flow run is cancelled meanwhile.

    Args:
        run: What ``submit_run`` returned, or a run's name.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        poll_interval: Seconds between two status requests. Default: 2.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.

    Returns:
        The address that the service answers at.

    Raises:
        ConfigurationError: The run is not a service, or a value is wrong.
        RunNotFoundError: There is no such run, or another run has its name now.
        RunError: The run ended before it answered.
        ServerError: The other server errors.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Service
        from prefect_dstack import submit_run, wait_for_service


        @flow
        def serve() -> str:
            service = submit_run(Service(port=8000, commands=["python serve.py"]), max_duration="2h")
            return wait_for_service.with_options(timeout_seconds=1800)(service)
        ```
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
    """Wait until a service answers requests: the async twin of ``wait_for_service``.

    Parameters, result and errors are the same.
    """
    job = _job(run, poll_interval, retry_budget, stream_logs=False, artifacts=False)

    async def body(client: AsyncClient) -> str:
        found = _checked(run, await _follow.afind(job, client), job)
        url = await found.wait_until_ready(
            poll_interval=poll_interval, retry_budget=retry_budget, sleep=job.asleep
        )
        return str(url)

    return await _follow.aexecute_task(job, await aload(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
def get_run(run: RunLike, credentials: CredentialsLike = None) -> RunDict | None:
    """Fetch a run and return it as ``submit_run`` does; None when there is no such run.

    ``run``: a run's name, or what ``submit_run`` returned. Raises the server errors.
    """
    with open_client(load(credentials), retry_budget=_BUDGET) as client:
        found = client.runs.get(name_of(run))
        return None if found is None or not _is_same(run, found) else info(found)


@task(cache_policy=NO_CACHE, retries=0)
async def aget_run(run: RunLike, credentials: CredentialsLike = None) -> RunDict | None:
    """Fetch a run: the async twin of ``get_run``, with its parameters, result and errors."""
    async with open_async_client(await aload(credentials), retry_budget=_BUDGET) as client:
        found = await client.runs.get(name_of(run))
        return None if found is None or not _is_same(run, found) else info(found)


@task(cache_policy=NO_CACHE, retries=0)
def stop_run(run: RunLike, credentials: CredentialsLike = None, *, abort: bool = False) -> RunDict | None:
    """Stop a run and return it as ``submit_run`` does, once the server shows it stopping.

    A run that has ended is returned as it is.

    Args:
        run: A run's name, or what ``submit_run`` returned.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        abort: Kill the run's processes without a grace period. Default: False.

    Returns:
        The run, or None if it does not exist.

    Raises:
        AccessDeniedError: The token may not stop the run.
        ServerError: The other server errors.
    """
    check_switches(abort=abort)
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
) -> RunDict | None:
    """Stop a run: the async twin of ``stop_run``, with its parameters, result and errors."""
    check_switches(abort=abort)
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
    log_timestamps: bool = False,
    mask_env: MaskEnv | None = None,
    callbacks: CallbacksLike = None,
) -> Job:
    job = prepare_to_watch(
        run,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        log_budget_bytes=log_budget_bytes,
        log_timestamps=log_timestamps,
        artifacts=artifacts,
        owner=task_owner(),
        logger=get_run_logger(),
        callbacks=callbacks,
        masking=Masking.from_dict(run if isinstance(run, Mapping) else {}, mask_env),
    )
    # An interrupt may come before the run is fetched, and its marker is already known here.
    if isinstance(run, Mapping):
        own(job, run.get("marker"), marker_prefix(task_owner()))
    return job


def _is_same(run: RunLike, found: Run | AsyncRun) -> bool:
    """Whether ``found`` is the run that was meant, and not a later one of its name."""
    return not isinstance(run, Mapping) or run.get("run_id") in (None, found.id)


def _checked(run: RunLike, found: Any, job: Job, mask_env: MaskEnv | None = None) -> Any:
    from dstack_core import RunNotFoundError
    from dstack_core.integration import check_masked_names

    if found is None or not _is_same(run, found):
        raise RunNotFoundError(f"There is no run {name_of(run)}, or another run has its name now.")
    if mask_env is not None:
        check_masked_names(job.masking.mask_env, env=found.env)
    own(job, found.marker, marker_prefix(task_owner()))
    job.note(found)
    return found
