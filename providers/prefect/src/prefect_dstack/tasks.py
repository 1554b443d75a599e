"""The tasks that submit a configuration: ``run_task`` waits for the end of its run, ``submit_run`` does not.

Each has an async twin with ``a`` before its name. They only check and name; ``_follow`` does what they share
with the block and the service tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack import _follow
from prefect_dstack._follow import with_masking
from prefect_dstack._job import OnCrash, prepare
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._submission import resolve
from prefect_dstack.credentials import CredentialsLike, aload, aload_git, load, load_git
from prefect_dstack.retry_conditions import is_below_cost_limit

if TYPE_CHECKING:
    from dstack_core import AsyncClient, CallbacksLike, Client, ConfigurationLike, OutcomeDict
    from prefect_dstack._options import SubmitOptions
    from prefect_dstack.run_dict import RunDict


@task(cache_policy=NO_CACHE, retries=0, retry_condition_fn=is_below_cost_limit)
def run_task(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[SubmitOptions],
) -> OutcomeDict:
    """Run a configuration on dstack to its end and return its outcome.

    The run's name is derived from the flow run and begins with the configuration's ``name``, unless
    ``run_name`` is given. Executing the same flow run again reattaches to its active run and takes
    over the outcome of its successful one; a run that failed or was stopped is followed by a new one.
    The log of an adopted run is relayed from its first line on, unless it was relayed to its end.
    A cancelled flow run stops its run. If the flow run was cancelled, crashed, failed or timed out before
    the task submits, the task submits nothing and ends as Cancelled. The events ``dstack.run.started`` and
    ``dstack.run.<final status>`` are emitted, and ``dstack.run.stopping`` when the run is stopped here.

    Args:
        configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``. Values
            of a dict's ``env`` may be ``Secret`` blocks or ``SecretStr``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        run_name: The run's name. Default: one made from the flow run.
        poll_interval: Seconds between two status requests. Default: 5.
        retry_budget: Seconds to keep retrying an unreachable server; the run keeps running meanwhile.
            Default: 600.
        stream_logs: Send the log lines to the run logger. Default: True.
        log_budget_bytes: How many bytes of log to send, in whole lines; None sends all. Where the
            rest begins, a line links to the run's page. Default: 10 MB.
        log_timestamps: Begin each line with the time at which the server logged it. Default: False.
        artifacts: Show the run in the flow run's artifacts: its page, its progress, its outcome, and what it
            reports. Default: True.
        callbacks: What is called while the run is followed: a class with methods of
            ``dstack_core.RunCallbacks``, its path (``"my_package.alerts.Alerts"``), an instance, or a list of
            those. An error in one is logged and does not fail the task. Default: none.
        on_crash: What happens to the run if the process dies or is interrupted: ``"stop"`` (with the hooks of
            this package, in a flow of ``serve()`` or a worker, also after SIGKILL), or ``"keep"`` for another
            execution to adopt. Default: ``"stop"``.
        resources: A ``Resources``, or the same dict or text as in YAML, such as ``{"gpu": "24GB.."}``.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``.
        retry_policy: A ``RetryPolicy``, True, False, or a dict: ``retry`` and ``limit`` as of a
            ``RetryPolicy``, or ``on_events`` and ``duration`` as of ``retry`` in YAML.
        max_duration: Seconds, ``"2h"`` or ``"off"``; by default the configuration's, else the profile's,
            else 24 h, so that no run stays without a limit.
        max_price: USD per hour.
        max_cost: The most that the run may cost in all, in USD. It is stopped there, and the task is not
            tried again. The server gets a ``max_duration`` too, for which the money lasts at the highest
            price on offer. Default: no limit.
        working_dir: Relative to the code's directory, or absolute.
        backends: The only backends to take machines from.
        env: Environment variables; they fill in names that have no value in the configuration, and override
            its values. Values are texts, ``Secret`` blocks or ``SecretStr``. Names without a value are taken
            from the environment of the flow run's process.
        args: The arguments that replace ``${{ run.args }}`` in the commands.
        profile: The name of a profile, or a ``Profile``; by default the one marked ``default: true``.
        reports: Give the run ``$DSTACK_RESULT_FILE``, whose content becomes ``outcome["result"]``, and the
            Python module ``dstack_report``. Default: True; a service, and a task without commands, is
            submitted as it is.
        tags: Tags that the run's machine gets at its cloud, by which a bill can be grouped (servers from
            0.19.5 on). A key that the configuration or the profile has keeps its value there. False also
            leaves out the client's ``default_tags``. Default: none of its own.
        survive: What the run survives instead of ending, within the same execution: a ``Survive``, a dict of
            its fields, or only for how long in all, seconds or ``"4h"``. A spot machine that is taken away,
            and no capacity, then begin another attempt of the same run. Not with ``retry_policy``. Default:
            nothing.
        fallbacks: What further runs of this task are submitted with, each after the one before ended for lack
            of a machine: a list of dicts of ``resources``, ``spot_policy``, ``backends``, ``max_price``,
            ``max_duration``, ``retry_policy`` or ``survive``, which replace those of the first run. The
            outcome is that of the last, with the attempts and the cost of all. Default: none.
        fallback_on_exit: Exit statuses after which a further run is submitted, too: ``{137: "next"}``, or the
            number of a step; the first of ``fallbacks`` is step 2. Default: none.
        debug_on_failure: How long the container is held after the commands have failed, for a person who
            opens a shell in it: seconds or ``"30m"``. The task fails at once, and a retry is a new run.
            Default: not at all.
        profiles_file: The file of profiles; by default ``.dstack/profiles.yml`` in ``repo_dir``. This
            machine's home directory is not used.
        repo_dir: A directory whose contents the run gets; commands start in it. If it is the top of a Git
            checkout, the run clones it and applies local changes as a diff; any other directory is uploaded.
        local_repo: Upload the contents of ``repo_dir`` even if it is a Git checkout.
        git_credentials: What a private repository is cloned with: a ``GitHubCredentials``-like block, a
            ``Secret`` block or ``SecretStr`` with a token or a private key, or ``"<block type>/<name>"`` of a
            saved block; by default those of ``credentials``.
        mask_env: Which values of the environment are masked in logs, errors, results and artifacts:
            ``"secrets"`` for those whose name (``HF_TOKEN``) or form (``postgres://user:password@host``)
            looks secret, or that are ``Secret`` blocks or ``SecretStr``; ``"all"``; ``"none"`` for the last
            kind alone; or a list of names beside those of ``"secrets"``, which the run's environment must
            have. Default: ``"secrets"``.

    Returns:
        The fields of ``dstack_core.Outcome`` as a dict of JSON-plain values: every result serializer can
        store it, and reading it needs no package. What the run reported is among them: ``result``,
        ``has_result``, ``metrics`` (the last value of each), and ``skipped`` (the reason) if it reported that
        it had nothing to do.

    Raises:
        ConfigurationError: A value is wrong; nothing was submitted.
        RunFailedError, NoCapacityError, RunStoppedError: The run's end, with its exit status and the last log
            lines.
        ServerError: ``ServerUnreachableError`` and the other server errors, which leave the run alone.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Task
        from prefect_dstack import run_task


        @flow
        def train() -> float:
            outcome = run_task(
                Task(commands=["python train.py"]),
                resources={"gpu": "24GB.."},
                max_duration="2h",
            )
            return outcome["cost"]
        ```

    Source: Prefect's documentation, "Tasks"; PROTOCOL 1.4, 1.6, 1.7.
    """
    block = load(credentials)
    login = load_git(block, options.get("git_credentials"))
    job = prepare(
        resolve(configuration, options, login),
        run_name=run_name,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        log_budget_bytes=log_budget_bytes,
        log_timestamps=log_timestamps,
        artifacts=artifacts,
        callbacks=callbacks,
        on_crash=on_crash,
    )

    def body(client: Client) -> OutcomeDict:
        return _follow.follow(job, client, _follow.submit(job, client))

    return _follow.execute_task(job, block, body)


@task(cache_policy=NO_CACHE, retries=0, retry_condition_fn=is_below_cost_limit)
async def arun_task(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[SubmitOptions],
) -> OutcomeDict:
    """Run a configuration on dstack to its end and return its outcome: the async twin of ``run_task``.

    Parameters, outcome and errors are those of ``run_task``; waiting does not block the event loop.
    """
    block = await aload(credentials)
    login = await aload_git(block, options.get("git_credentials"))
    job = prepare(
        resolve(configuration, options, login),
        run_name=run_name,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=stream_logs,
        log_budget_bytes=log_budget_bytes,
        log_timestamps=log_timestamps,
        artifacts=artifacts,
        callbacks=callbacks,
        on_crash=on_crash,
    )

    async def body(client: AsyncClient) -> OutcomeDict:
        return await _follow.afollow(job, client, await _follow.asubmit(job, client))

    return await _follow.aexecute_task(job, block, body)


@task(cache_policy=NO_CACHE, retries=0)
def submit_run(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    retry_budget: float = 600.0,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[SubmitOptions],
) -> RunDict:
    """Submit a configuration to dstack and return its run without waiting for the end.

    The name, the reuse by another execution of the flow run, and what stops the run while it is being
    submitted are those of ``run_task``. Afterwards ``wait_for_run`` watches it; without that the hooks of
    this package stop it when its flow run is cancelled or crashes. With ``on_crash="keep"`` only a
    cancellation stops it, so that a service may outlive its flow run.

    Args:
        configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        run_name: The run's name. Default: one made from the flow run.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.
        callbacks: As for ``run_task``; only ``on_submitted`` is called here, the others by ``wait_for_run``.
            Default: none.
        on_crash: ``"stop"`` or ``"keep"``, as for ``run_task``. Default: ``"stop"``.
        **options: As for ``run_task``.

    Returns:
        A dict of JSON-plain values: ``run_name``, ``run_id``, ``status``, ``url`` of its page,
        ``service_url`` (None for a task), ``marker``, ``outcome`` (a dict, None until the run has ended), and
        ``mask_env`` and ``secret_names`` (names of variables), by which ``wait_for_run`` masks.

    Raises:
        ConfigurationError: A value is wrong; nothing was submitted.
        ServerError: The server errors.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Task
        from prefect_dstack import submit_run, wait_for_run


        @flow
        def train_both() -> list[dict]:
            runs = [submit_run(Task(commands=[f"python train.py --seed {seed}"])) for seed in (1, 2)]
            return [wait_for_run(run) for run in runs]
        ```
    """
    block = load(credentials)
    login = load_git(block, options.get("git_credentials"))
    job = prepare(
        resolve(configuration, options, login, ends=False, follows=False),
        run_name=run_name,
        retry_budget=retry_budget,
        callbacks=callbacks,
        on_crash=on_crash,
    )

    def body(client: Client) -> RunDict:
        run = _follow.submit_only(job, client)
        job.logger.info("Run %s: %s", run.name, run.url)
        return with_masking(run, job)

    return _follow.execute_task(job, block, body)


@task(cache_policy=NO_CACHE, retries=0)
async def asubmit_run(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    retry_budget: float = 600.0,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[SubmitOptions],
) -> RunDict:
    """Submit a configuration to dstack and return the run: the async twin of ``submit_run``.

    Parameters, result and errors are the same.
    """
    block = await aload(credentials)
    login = await aload_git(block, options.get("git_credentials"))
    job = prepare(
        resolve(configuration, options, login, ends=False, follows=False),
        run_name=run_name,
        retry_budget=retry_budget,
        callbacks=callbacks,
        on_crash=on_crash,
    )

    async def body(client: AsyncClient) -> RunDict:
        run = await _follow.asubmit_only(job, client)
        job.logger.info("Run %s: %s", run.name, run.url)
        return with_masking(run, job)

    return await _follow.aexecute_task(job, block, body)
