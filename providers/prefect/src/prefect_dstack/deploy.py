"""The task that keeps a service deployed: submitted, or updated in place.

The problem: a service outlives the flow run that deploys it, and the next deployment finds it active under
its name. Executed again, a flow run must neither deploy twice nor mistake its own service for another's.

The idea: the service's name is fixed, and its marker names the flow run that submitted it and counts its
submissions. The marker does not begin like those of runs that a flow run owns, so no hook, worker or reaper
stops it. An update leaves the marker alone: a new one would restart the replicas of a service that is already
in the wanted state. Only a service that another flow run owns gets one; from then on no process stops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack import _follow
from prefect_dstack._callbacks import note_wait
from prefect_dstack._follow import with_masking
from prefect_dstack._job import prepare, refuse
from prefect_dstack._names import owner_of, task_owner
from prefect_dstack._stop import STOPPING
from prefect_dstack._submission import resolve
from prefect_dstack.credentials import CredentialsLike, aload, aload_git, load, load_git

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, CallbacksLike, Client, ConfigurationLike, Run
    from dstack_core.integration import AttemptNames
    from prefect_dstack._job import Job
    from prefect_dstack._options import SubmitOptions
    from prefect_dstack._secrets import GitLogin
    from prefect_dstack.run_dict import RunDict

OnActive = Literal["update", "replace", "fail"]


@task(cache_policy=NO_CACHE, retries=0)
def deploy_service(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    on_active: OnActive = "update",
    wait: bool = True,
    poll_interval: float = 2.0,
    retry_budget: float = 600.0,
    callbacks: CallbacksLike = None,
    **options: Unpack[SubmitOptions],
) -> RunDict:
    """Deploy a service under a fixed name and return it once it answers; it outlives the flow run.

    No hook, worker or reaper stops it afterwards, and it has no ``max_duration`` unless one is given. If the
    task is cancelled or interrupted before the service answers, it stops a service that it has submitted; one
    that it has updated keeps running. If a run of that name is stopping, the task waits for its end. Executed
    again, the flow run finds the service it has deployed.

    Args:
        configuration: A ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        run_name: The service's name. Default: the configuration's ``name``.
        on_active: What to do with an active run of that name: ``"update"`` it in place, as ``dstack apply``
            does (the server replaces one replica after the other), ``"replace"`` it by stopping it first, or
            ``"fail"``. Default: ``"update"``.
        wait: Wait until the service answers and replicas from before an update are gone. How long that may
            take is the task's ``timeout_seconds``. Default: True.
        poll_interval: Seconds between two status requests. Default: 2.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.
        callbacks: As for ``run_task``: ``on_submitted``, ``on_running`` once the service answers, and
            ``on_ended`` if it ends before. Default: none.
        **options: As for ``run_task``.

    Returns:
        A dict of JSON-plain values as of ``submit_run``; ``service_url`` is where the service answers.

    Raises:
        ConfigurationError: A value is wrong, or the service has no name; nothing was submitted.
        RunNameTakenError: A run of that name is active, with ``on_active="fail"``.
        RunNotUpdatableError: The active run cannot be updated to this configuration; nothing was changed.
        RunError: The run ended before it answered.
        ServerError: The other server errors.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Service
        from prefect_dstack import deploy_service


        @flow
        def deploy() -> str:
            service = deploy_service(Service(port=8000, commands=["python serve.py"]), run_name="llm")
            return service["service_url"]
        ```

    Source: PROTOCOL 1.4.
    """
    from dstack_core import RunError

    block = load(credentials)
    login = load_git(block, options.get("git_credentials"))
    plan = _plan(
        configuration, dict(options), login, run_name, on_active, poll_interval, retry_budget, callbacks
    )

    def body(client: Client) -> RunDict:
        run, failed = _deploy(plan, client), None
        try:
            if wait:
                run.wait_until_ready(
                    poll_interval=poll_interval, retry_budget=retry_budget, sleep=plan.job.sleep
                )
        except RunError as error:
            failed = error
        note_wait(plan.job.notifier, run, failed, answers=wait)
        for pause in plan.job.pauses():
            plan.job.sleep(pause)
        if failed is not None:
            raise failed
        return plan.result(run)

    return _follow.execute_task(plan.job, block, body)


@task(cache_policy=NO_CACHE, retries=0)
async def adeploy_service(
    configuration: ConfigurationLike,
    credentials: CredentialsLike = None,
    *,
    run_name: str | None = None,
    on_active: OnActive = "update",
    wait: bool = True,
    poll_interval: float = 2.0,
    retry_budget: float = 600.0,
    callbacks: CallbacksLike = None,
    **options: Unpack[SubmitOptions],
) -> RunDict:
    """Deploy a service under a fixed name: the async twin of ``deploy_service``.

    Parameters, result and errors are the same.
    """
    from dstack_core import RunError

    block = await aload(credentials)
    login = await aload_git(block, options.get("git_credentials"))
    plan = _plan(
        configuration, dict(options), login, run_name, on_active, poll_interval, retry_budget, callbacks
    )

    async def body(client: AsyncClient) -> RunDict:
        run, failed = await _adeploy(plan, client), None
        try:
            if wait:
                await run.wait_until_ready(
                    poll_interval=poll_interval, retry_budget=retry_budget, sleep=plan.job.asleep
                )
        except RunError as error:
            failed = error
        note_wait(plan.job.notifier, run, failed, answers=wait)
        for pause in plan.job.pauses():
            await plan.job.asleep(pause)
        if failed is not None:
            raise failed
        return plan.result(run)

    return await _follow.aexecute_task(plan.job, block, body)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A deployment: its job, the names of its runs, and what becomes of an active run."""

    job: Job
    names: AttemptNames
    on_active: OnActive

    def mark(self, found: Run | AsyncRun | None) -> bool:
        """Set the marker of the next deployment; return whether ``found`` is this one's, and active."""
        number = self.names.number_of(found.marker) if found is not None else None
        is_active = found is not None and found.outcome() is None
        self.job.attempt.ref = self.names.ref(1 if number is None else number + (not is_active))
        return number is not None and is_active

    def arguments(self, found: Run | AsyncRun | None) -> dict[str, Any]:
        """Return the arguments of the submission or update."""
        arguments = self.job.submission()
        is_active = found is not None and found.outcome() is None
        # Without a marker the update keeps the one that the service has.
        if self.on_active == "update" and found is not None and is_active and owner_of(found.marker) is None:
            arguments["marker"] = None
        return arguments

    def must_end(self, found: Run | AsyncRun | None, *, is_own: bool) -> bool:
        """Whether an active run has to end before the service is submitted."""
        if found is None or found.outcome() is not None:
            return False
        return found.last_status.is_stopping or (self.on_active == "replace" and not is_own)

    def note(self, run: Run | AsyncRun, found: Run | AsyncRun | None, project: str) -> None:
        """Log what was done. Only a run that was submitted now is stopped when the task ends early."""
        job = self.job
        job.note(run)
        job.is_owned = found is None or found.id != run.id
        if job.notifier is not None:
            job.notifier.submitted(run, project, is_taken_over=not job.is_owned)
        done = "submitted" if job.is_owned else f"active, deployment {run.deployment_num}"
        job.logger.info("Service %s is %s: %s", run.name, done, run.url)

    def result(self, run: Run | AsyncRun) -> RunDict:
        """Return the run, after a line about where it answers."""
        if run.service_url is not None:
            url = run.browser_service_url or run.service_url
            self.job.logger.info("Service %s: %s", run.name, url)
        return with_masking(run, self.job)


def _plan(
    configuration: ConfigurationLike,
    options: dict[str, Any],
    login: GitLogin,
    run_name: str | None,
    on_active: OnActive,
    poll_interval: float,
    retry_budget: float,
    callbacks: CallbacksLike,
) -> _Plan:
    from dstack_core.integration import AttemptNames, make_marker

    if on_active not in ("update", "replace", "fail"):
        refuse(f'on_active: expected "update", "replace" or "fail", got {on_active!r}.')
    submission = resolve(configuration, options, login, max_duration=None, ends=False, follows=False)
    kind, name = submission.configuration.type, run_name or submission.configuration.name
    if kind != "service":
        refuse(f"configuration: expected a service, got a {kind}. Use run_task or submit_run for it.")
    if not name:
        refuse("run_name: expected the service's name, got none. Pass run_name, or write name in it.")
    job = prepare(
        submission,
        run_name=name,
        on_crash="stop",
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        stream_logs=False,
        callbacks=callbacks,
    )
    owner = task_owner()
    # The name is fixed: there is no attempt to choose, and before the submission nothing to stop.
    job.attempt.is_chosen = True
    fingerprint = job.names.stem.rpartition("/")[2]
    stem = make_marker("prefect-service", owner.flow_run_id or owner.task_run_id, fingerprint)
    return _Plan(job, AttemptNames(name, stem, name), on_active)


@contextmanager
def _advised() -> Iterator[None]:
    """Add to an error what this task offers for it."""
    from dstack_core import RunNotUpdatableError

    try:
        yield
    except RunNotUpdatableError as error:
        text = f'{error.message} Or pass on_active="replace", which stops it and submits a new one.'
        raise RunNotUpdatableError(text, changes=error.changes) from None


def _deploy(plan: _Plan, client: Client) -> Run:
    job = plan.job
    job.page = client.run_url()
    found = _follow.find(job, client)
    is_own = plan.mark(found)
    job.check_flow_run()
    if found is not None and plan.must_end(found, is_own=is_own):
        job.logger.warning(STOPPING, found.name, found.url)
        found.stop(until="ended", sleep=job.sleep)
    do = client.runs.apply if plan.on_active == "update" else client.runs.submit
    with job.submitting(), _advised():
        run = do(**plan.arguments(found), sleep=job.sleep, on_event=job.relay.handle_contact)
    plan.note(run, found, client.project)
    return run


async def _adeploy(plan: _Plan, client: AsyncClient) -> AsyncRun:
    job = plan.job
    job.page = client.run_url()
    found = await _follow.afind(job, client)
    is_own = plan.mark(found)
    await asyncio.to_thread(job.check_flow_run)
    if found is not None and plan.must_end(found, is_own=is_own):
        job.logger.warning(STOPPING, found.name, found.url)
        await found.stop(until="ended", sleep=job.asleep)
    do = client.runs.apply if plan.on_active == "update" else client.runs.submit
    with job.submitting(), _advised():
        run = await do(**plan.arguments(found), sleep=job.asleep, on_event=job.relay.handle_contact)
    plan.note(run, found, client.project)
    return run
