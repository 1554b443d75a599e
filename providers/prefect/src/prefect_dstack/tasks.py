"""The tasks that submit a configuration: and wait for the end of its run, or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack import _follow
from prefect_dstack._connect import CredentialsLike, aload, load
from prefect_dstack._prepare import OnCrash, prepare
from prefect_dstack._run_info import info

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Client, ConfigurationLike, Resources, RetryPolicy, SpotPolicy


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
    artifacts: bool = True,
    on_crash: OnCrash = "stop",
) -> dict[str, Any]:
    """Run a configuration on dstack to its end and return its outcome.

    ``configuration``: a ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
    ``credentials``: a ``DstackCredentials`` block, the name of a saved one, or None for the environment
    and ``~/.dstack/config.yml``. ``resources``, ``spot_policy``, ``retry_policy``, ``max_price`` (USD
    per hour), ``working_dir`` and ``backends`` as in ``dstack_core``'s ``client.runs.submit``.

    ``max_duration``: seconds, ``"2h"`` or ``"off"``; the configuration's own, else 24 h, so that no run
    stays without a limit. ``poll_interval`` (seconds) is the pause between two status requests. An
    unreachable server is retried for ``retry_budget`` (seconds); the run keeps running meanwhile.
    ``stream_logs`` (bool) sends its log lines to the run logger. ``artifacts`` (bool) shows the run in the
    flow run's artifacts: its page, its progress, its outcome. The events ``dstack.run.started`` and
    ``dstack.run.<final status>`` are emitted, and ``dstack.run.stopping`` when the run is stopped here.

    The run's name is made from the flow run, and the beginning of it from the configuration's ``name``,
    unless ``run_name`` is given. Executing the same flow run again reattaches to its active run and takes
    over the outcome of its successful one; a run that failed or was stopped is followed by a new one.
    The log of an adopted run is relayed from its first line on, unless it was relayed to its end.
    A cancelled flow run stops its run; a task of one that was cancelled, crashed, failed or timed out
    before submits nothing and ends as Cancelled. ``on_crash`` is what a process that dies or is interrupted
    leaves behind: ``"stop"`` (with the hooks of this package also after SIGKILL), or ``"keep"`` for
    another execution to adopt.

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
        artifacts=artifacts,
        on_crash=on_crash,
    )

    def body(client: Client) -> dict[str, Any]:
        return _follow.follow(job, _follow.submit(job, client))

    return _follow.execute_task(job, load(credentials), body)


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
    artifacts: bool = True,
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
        artifacts=artifacts,
        on_crash=on_crash,
    )

    async def body(client: AsyncClient) -> dict[str, Any]:
        return await _follow.afollow(job, await _follow.asubmit(job, client))

    return await _follow.aexecute_task(job, await aload(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
def submit_run(
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
    retry_budget: float = 600.0,
    on_crash: OnCrash = "stop",
) -> dict[str, Any]:
    """Submit a configuration to dstack and return its run without waiting for the end.

    Parameters as in ``run_task``; so are the name, the reuse by another execution of the flow run and
    what stops it while it is being submitted. Afterwards ``wait_for_run`` watches it; without that the
    hooks of this package stop it when its flow run is cancelled or crashes. With ``on_crash="keep"`` only a
    cancellation stops it, so that a service may outlive its flow run.

    Returns a dict of JSON-plain values: ``run_name``, ``run_id``, ``status``, ``url`` of its page,
    ``service_url`` (None for a task), ``marker``, and ``outcome`` (a dict, None until the run has ended).
    Raises ``ConfigurationError`` before anything is submitted, else the server errors.
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
        retry_budget=retry_budget,
        on_crash=on_crash,
    )

    def body(client: Client) -> dict[str, Any]:
        run = _follow.submit(job, client)
        job.logger.info("Run %s: %s", run.name, run.url)
        return info(run)

    return _follow.execute_task(job, load(credentials), body)


@task(cache_policy=NO_CACHE, retries=0)
async def asubmit_run(
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
    retry_budget: float = 600.0,
    on_crash: OnCrash = "stop",
) -> dict[str, Any]:
    """Submit a configuration to dstack and return the run: the async twin of ``submit_run``."""
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
        retry_budget=retry_budget,
        on_crash=on_crash,
    )

    async def body(client: AsyncClient) -> dict[str, Any]:
        run = await _follow.asubmit(job, client)
        job.logger.info("Run %s: %s", run.name, run.url)
        return info(run)

    return await _follow.aexecute_task(job, await aload(credentials), body)
