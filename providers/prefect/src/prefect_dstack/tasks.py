"""The tasks a flow calls: run a dstack configuration to its end."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack._connect import CALL_BUDGET, CredentialsLike, aload, load, open_async_client, open_client
from prefect_dstack._job import OnCrash, prepare
from prefect_dstack._probe import StopRequested
from prefect_dstack._steps import adrive, drive
from prefect_dstack._stop import astop, stop
from prefect_dstack._submit import acquire

if TYPE_CHECKING:
    from dstack_core import ConfigurationLike, Resources, RetryPolicy, SpotPolicy


@task(cache_policy=NO_CACHE, retries=0)
def run_task(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    resources: Resources | None = None,
    spot_policy: SpotPolicy | str | None = None,
    retry_policy: RetryPolicy | None = None,
    max_duration: int | str | None = None,
    max_price: float | None = None,
    working_dir: str | None = None,
    backends: list[str] | None = None,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    on_crash: OnCrash = "stop",
) -> dict[str, Any]:
    """Run a configuration on dstack to its end and return its outcome.

    ``configuration``: a ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
    ``credentials``: a ``DstackCredentials`` block, the name of a saved one, or None for the environment
    and ``~/.dstack/config.yml``. ``resources``, ``spot_policy``, ``retry_policy``, ``max_price`` (USD
    per hour), ``working_dir`` and ``backends`` as in ``dstack_core``'s ``client.runs.submit``.

    ``max_duration``: seconds, ``"2h"`` or ``"off"``; the configuration's own, else 24 h, so that nothing
    runs for ever. ``poll_interval`` (seconds) is the pause between two looks. A silent server is borne
    for ``retry_budget`` (seconds); the run goes on meanwhile. ``stream_logs`` (bool) sends its log lines
    to the run logger.

    The run's name is made from the flow run, and the beginning of it from the configuration's ``name``,
    unless ``run_name`` is given. Executing the same flow run again takes up its active run and takes
    over the outcome of its successful one; a run that failed or was stopped is followed by a new one.
    A cancelled flow run stops its run. ``on_crash`` says what a process that dies or is interrupted
    leaves behind: ``"stop"`` (with the hooks of this package also after SIGKILL), or ``"keep"`` for
    another execution to take up.

    Returns the fields of ``dstack_core.Outcome`` as a dict of JSON-plain values: every result
    serializer can store it, and reading it needs no package. Raises ``ConfigurationError`` before
    anything is submitted; ``RunFailedError``, ``NoCapacityError`` or ``RunStoppedError`` with the exit
    status and the last log lines; ``ServerUnreachableError`` and the other server errors, which leave
    the run alone. Source: Prefect's documentation, "Tasks"; PROTOCOL 1.4, 1.6, 1.7.
    """
    job = prepare(
        configuration,
        run_name=run_name,
        options={
            "resources": resources,
            "spot_policy": spot_policy,
            "retry_policy": retry_policy,
            "max_duration": max_duration,
            "max_price": max_price,
            "working_dir": working_dir,
            "backends": backends,
        },
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        on_crash=on_crash,
    )
    block = load(credentials)
    try:
        with open_client(block, retry_budget=min(CALL_BUDGET, retry_budget)) as client:
            run = drive(acquire(job.target, job.spec, retry_budget, job.logger), client, job.sleep)
            job.tell_start(run)
            for event in run.follow(poll_interval=poll_interval, retry_budget=retry_budget, sleep=job.sleep):
                job.relay.handle(event)
        return job.result()
    except StopRequested as request:
        if not job.stops_after(request):
            job.leave(request)
        else:
            try:
                stop(block, job.target, job.relay, job.logger)
            except BaseException:
                # The same cancellation came another way while its probe was acted upon.
                stop(block, job.target, job.relay, job.logger)
                raise
        return cast("dict[str, Any]", job.cancelled(request))
    except BaseException as error:
        if job.stops_after(error):
            stop(block, job.target, job.relay, job.logger)
        else:
            job.leave(error)
        raise
    finally:
        job.probe.close()


@task(cache_policy=NO_CACHE, retries=0)
async def arun_task(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    resources: Resources | None = None,
    spot_policy: SpotPolicy | str | None = None,
    retry_policy: RetryPolicy | None = None,
    max_duration: int | str | None = None,
    max_price: float | None = None,
    working_dir: str | None = None,
    backends: list[str] | None = None,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    on_crash: OnCrash = "stop",
) -> dict[str, Any]:
    """Run a configuration on dstack to its end and return its outcome: the async twin of ``run_task``.

    Parameters, outcome and errors are those of ``run_task``; waiting does not block the event loop.
    """
    job = prepare(
        configuration,
        run_name=run_name,
        options={
            "resources": resources,
            "spot_policy": spot_policy,
            "retry_policy": retry_policy,
            "max_duration": max_duration,
            "max_price": max_price,
            "working_dir": working_dir,
            "backends": backends,
        },
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        on_crash=on_crash,
    )
    block = await aload(credentials)
    try:
        async with open_async_client(block, retry_budget=min(CALL_BUDGET, retry_budget)) as client:
            run = await adrive(acquire(job.target, job.spec, retry_budget, job.logger), client, job.asleep)
            job.tell_start(run)
            events = run.follow(poll_interval=poll_interval, retry_budget=retry_budget, sleep=job.asleep)
            async with aclosing(events):
                async for event in events:
                    job.relay.handle(event)
        return job.result()
    except StopRequested as request:
        if not job.stops_after(request):
            job.leave(request)
        else:
            try:
                await astop(block, job.target, job.relay, job.logger)
            except BaseException:
                # The same cancellation came another way while its probe was acted upon.
                await astop(block, job.target, job.relay, job.logger)
                raise
        return cast("dict[str, Any]", job.cancelled(request))
    except BaseException as error:
        if job.stops_after(error):
            await astop(block, job.target, job.relay, job.logger)
        else:
            job.leave(error)
        raise
    finally:
        job.probe.close()
