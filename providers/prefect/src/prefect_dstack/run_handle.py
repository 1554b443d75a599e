"""The handle to a run that a block submitted: to wait for it, to fetch its outcome and to stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, cast

from prefect.blocks.abstract import JobRun

from prefect_dstack import _follow
from prefect_dstack._block_submission import git_of_block, submission_of_block
from prefect_dstack._cancellation import StopRequested
from prefect_dstack._follow import info
from prefect_dstack._job import Job, allow_steps, own, prepare_to_watch
from prefect_dstack._names import calling_owner
from prefect_dstack._secrets import GitLogin, Masking
from prefect_dstack._stop import STOPPING, log_stop
from prefect_dstack.credentials import (
    PATIENT_TIMEOUT,
    aload_git,
    load_git,
    open_async_client,
    open_client,
)

if TYPE_CHECKING:
    from dstack_core import Event, Outcome, OutcomeDict
    from dstack_core.integration import Fallbacks, RunRef
    from prefect_dstack.job_block import DstackRun
    from prefect_dstack.run_dict import RunDict

# For the calls that wait for nothing but a reply; a longer outage is an error that the caller sees soon.
_RETRY_BUDGET = 30.0


class DstackRunHandle(JobRun["OutcomeDict"]):
    """A handle to a run that a ``DstackRun`` submitted: to wait for it and to stop it. It can be pickled.

    ``run_name``, ``run_id``, ``url`` (of its page) and ``service_url`` (str, None for other runs than
    services). With ``fallbacks`` they are those of the newest step that this process knows.
    """

    def __init__(self, block: DstackRun, run: RunDict, first: RunRef) -> None:
        self._block = block
        self._run = run
        # With fallbacks, ``run`` may be that of a later step.
        self._first = first
        self._outcome: OutcomeDict | None = None

    @property
    def run_name(self) -> str:
        """Return the run's name."""
        return str(self._run["run_name"])

    @property
    def run_id(self) -> str:
        """Return the run's id, which no other run has."""
        return str(self._run["run_id"])

    @property
    def url(self) -> str:
        """Return the address of the run's page."""
        return str(self._run["url"])

    @property
    def service_url(self) -> str | None:
        """Return the address a service answers at, as known when it was submitted."""
        url = self._run["service_url"]
        return None if url is None else str(url)

    def wait_for_completion(self) -> None:  # type: ignore[override]  # Prefect's own integrations do so too
        """Wait for the end of the run and relay its log; a second call returns at once.

        With ``fallbacks`` it submits the further steps: without a call of it none follows.

        A cancelled or interrupted flow run stops the run, as with ``run_task``. Where no signal announced
        the cancellation, ``StopRequested`` is raised, which is not an ``Exception``: Prefect marks the task
        as Crashed and does not retry it.

        Raises:
            RunFailedError, NoCapacityError, RunStoppedError: The run's end.
            ServerError: The server errors, which leave the run alone.
        """
        if self._outcome is not None:
            return
        job = self._watch(self._login())

        def body(client: Any) -> OutcomeDict:
            self._run = info(_follow.watch(job, client, self._same(_follow.find_newest(job, client))))
            return job.result()

        with cancellation_logged(job):
            self._outcome = _follow.execute(job, self._block.credentials, body)

    async def await_for_completion(self) -> None:
        """Wait for the end of the run: the async twin of ``wait_for_completion``."""
        if self._outcome is not None:
            return
        job = self._watch(await self._alogin())

        async def body(client: Any) -> OutcomeDict:
            found = self._same(await _follow.afind_newest(job, client))
            self._run = info(await _follow.awatch(job, client, found))
            return job.result()

        with cancellation_logged(job):
            self._outcome = await _follow.aexecute(job, self._block.credentials, body)

    def fetch_result(self) -> OutcomeDict:  # type: ignore[override]  # Prefect's own integrations do so too
        """Return the fields of ``dstack_core.Outcome`` as JSON-plain values, read from the run and its log.

        Raises the run's error when it did not succeed, ``RuntimeError`` before it has ended, and the
        server errors.
        """
        if self._outcome is None:
            job = self._watch(self._login())
            with self._client() as client:
                run = self._ended(_follow.find_newest(job, client), job)
                for event in run.follow(retry_budget=_RETRY_BUDGET):
                    self._outcome = _outcome_in(event, job)
        return self._outcome or cast("OutcomeDict", {})

    async def afetch_result(self) -> OutcomeDict:
        """Return the outcome: the async twin of ``fetch_result``."""
        if self._outcome is None:
            job = self._watch(await self._alogin())
            async with open_async_client(self._block.credentials, retry_budget=_RETRY_BUDGET) as client:
                run = self._ended(await _follow.afind_newest(job, client), job)
                async with aclosing(run.follow(retry_budget=_RETRY_BUDGET)) as events:
                    async for event in events:
                        self._outcome = _outcome_in(event, job)
        return self._outcome or cast("OutcomeDict", {})

    def stop(self, abort: bool = False) -> None:
        """Stop the run; returns once the server shows it stopping. One that has ended is left alone.

        With ``fallbacks`` it is the newest step that is stopped, and none follows. With ``abort`` its
        processes are killed without a grace period. Raises the server errors.
        """
        from dstack_core.integration import newest_step

        self.logger.warning(STOPPING, self.run_name, self.url)
        with self._client() as client:
            name = self.run_name
            if (fallbacks := self._fallbacks()) is not None:
                name = newest_step(client, self._first, fallbacks).name
            run = self._same(client.runs.get(name))
            log_stop(self.logger, run.stop(abort=abort, until="stopping", timeout=PATIENT_TIMEOUT))

    async def astop(self, abort: bool = False) -> None:
        """Stop the run: the async twin of ``stop``."""
        from dstack_core.integration import anewest_step

        self.logger.warning(STOPPING, self.run_name, self.url)
        async with open_async_client(self._block.credentials, retry_budget=_RETRY_BUDGET) as client:
            name = self.run_name
            if (fallbacks := self._fallbacks()) is not None:
                name = (await anewest_step(client, self._first, fallbacks)).name
            run = self._same(await client.runs.get(name))
            log_stop(self.logger, await run.stop(abort=abort, until="stopping", timeout=PATIENT_TIMEOUT))

    def _client(self) -> Any:
        return open_client(self._block.credentials, retry_budget=_RETRY_BUDGET)

    def _fallbacks(self) -> Fallbacks | None:
        from dstack_core.integration import host_fallbacks

        return host_fallbacks(self._block.fallbacks, self._block.fallback_on_exit)

    def _login(self) -> GitLogin:
        """Return what a further step clones private repositories with; nothing if none can follow."""
        block = self._block
        return load_git(block.credentials, git_of_block(block)) if block.fallbacks else GitLogin()

    async def _alogin(self) -> GitLogin:
        block = self._block
        return await aload_git(block.credentials, git_of_block(block)) if block.fallbacks else GitLogin()

    def _watch(self, login: GitLogin) -> Job:
        job = prepare_to_watch(
            self._run,
            poll_interval=self._block.poll_interval,
            retry_budget=self._block.retry_budget,
            stream_logs=self._block.stream_logs,
            log_budget_bytes=self._block.log_budget_bytes,
            log_timestamps=self._block.log_timestamps,
            artifacts=self._block.artifacts,
            owner=calling_owner("wait"),
            logger=self.logger,
            callbacks=self._block.callbacks,
            masking=Masking(self._block.mask_env, self._block.secret_names),
        )
        own(job, self._run["marker"])
        if self._block.fallbacks:
            allow_steps(job, submission_of_block(self._block, login), self._first)
        return job

    def _same(self, found: Any) -> Any:
        from dstack_core import RunNotFoundError

        if found is None or (found.id != self.run_id and not self._is_later(found)):
            raise RunNotFoundError(f"Run {self.run_name} no longer exists: {self.url}")
        return found

    def _is_later(self, found: Any) -> bool:
        """Whether it is the run of a step that followed the one that this handle knows."""
        from dstack_core.integration import split_step

        marker = found.marker or ""
        is_step = bool(self._block.fallbacks) and split_step(marker)[0] == self._first.marker
        return is_step and marker != self._run["marker"]

    def _ended(self, found: Any, job: Job) -> Any:
        from dstack_core.integration import raise_for_outcome

        outcome: Outcome | None = self._same(found).outcome()
        if outcome is not None and job.fallbacks is not None:
            # Its end is not that of the job: the process that waits submits the next step.
            is_last = job.fallbacks.step_after(job.attempt.step, outcome) is None
            outcome = outcome if is_last else None
        if outcome is None:
            raise RuntimeError(f"Run {self.run_name} has not ended. Call wait_for_completion() first.")
        raise_for_outcome(outcome)
        return found


def _outcome_in(event: Event, job: Job) -> OutcomeDict | None:
    """Return the outcome in the last event of a run, which has what the log reports; else None."""
    from dstack_core import RunFinished
    from dstack_core.integration import outcome_dict

    if job.steps is not None and isinstance(event, RunFinished):
        event = job.steps.take(event) or event
    return outcome_dict(event.outcome) if isinstance(event, RunFinished) else None


@contextmanager
def cancellation_logged(job: Job) -> Iterator[None]:
    """Log a cancellation that no signal announced."""
    try:
        yield
    except StopRequested as request:
        job.logger.warning("%s", _follow.cancelled_state(job, request).message)
        raise
