"""A run as a block: its configuration saved in Prefect, triggered from any flow, task or script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from prefect.blocks.abstract import JobBlock, JobRun
from pydantic import ConfigDict, Field, HttpUrl, field_validator

from prefect_dstack import _follow
from prefect_dstack._connect import open_async_client, open_client
from prefect_dstack._job import Job
from prefect_dstack._prepare import calling_owner, own, prepare, prepare_to_watch
from prefect_dstack._probe import StopRequested
from prefect_dstack._run_info import ainfo, info
from prefect_dstack.credentials import DstackCredentials


class DstackRun(JobBlock[dict[str, Any]]):
    """Run one configuration on dstack: a task or a service, as it is written in ``.dstack.yml``.

    ``trigger`` submits it and returns a ``DstackRunHandle``. Within a flow, executing the same flow run
    again takes up its active run and takes over its successful one, as with ``run_task``. Without a
    ``max_duration`` a run gets 24 h, so that nothing runs for ever. A wrong value raises pydantic's
    ``ValidationError``. Source: Prefect's documentation, "Blocks".

    Example:
        Load a stored run, trigger it and wait for its outcome:
        ```python
        from prefect_dstack import DstackRun

        training = DstackRun.load("BLOCK_NAME")
        handle = training.trigger()
        handle.wait_for_completion()
        outcome = handle.fetch_result()
        ```
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name: ClassVar[str | None] = "dstack Run"
    _block_type_slug: ClassVar[str | None] = "dstack-run"
    _description: ClassVar[str | None] = "A task or service to run on dstack, with its logs and its outcome."
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://dstack.ai/docs/")
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/dstackai.png?size=200")

    credentials: DstackCredentials = Field(description="Where the dstack server is, and who asks.")
    configuration: dict[str, Any] = Field(
        description="What to run, with the keys of a .dstack.yml: type, commands, resources and so on.",
    )
    run_name: str | None = Field(
        default=None, description="Name of the run; without one it is made from the flow run."
    )
    on_crash: Literal["stop", "keep"] = Field(
        default="stop",
        description="Whether a run is stopped or kept when its flow's process dies or is interrupted.",
    )
    poll_interval: float = Field(
        default=5.0, gt=0, description="Seconds between two looks at the run while it is waited for."
    )
    retry_budget: float = Field(
        default=600.0, ge=0, description="Seconds that a silent dstack server is borne."
    )
    stream_logs: bool = Field(
        default=True, description="Whether the run's log lines are sent to the run logger."
    )
    artifacts: bool = Field(
        default=True, description="Whether the run is shown in the artifacts of its flow run."
    )

    @field_validator("configuration")
    @classmethod
    def _is_understood(cls, value: dict[str, Any]) -> dict[str, Any]:
        from dstack_core import ConfigurationError, load_configuration

        try:
            load_configuration(value)
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return value

    def trigger(self) -> DstackRunHandle:  # type: ignore[override]  # Prefect's own integrations do so too
        """Submit the run and return it without waiting. Raises ``ConfigurationError``, the server errors."""
        job = self._job()
        with _told(job):
            return _follow.execute(
                job, self.credentials, lambda client: self._handle(info(_follow.submit(job, client)))
            )

    async def atrigger(self) -> DstackRunHandle:
        """Submit the run and return it: the async twin of ``trigger``."""
        job = self._job()

        async def body(client: Any) -> DstackRunHandle:
            return self._handle(await ainfo(await _follow.asubmit(job, client)))

        with _told(job):
            return await _follow.aexecute(job, self.credentials, body)

    def _job(self) -> Job:
        described = json.dumps(
            [self.configuration, self.run_name, self.on_crash], sort_keys=True, default=str
        )
        return prepare(
            self.configuration,
            run_name=self.run_name,
            options={},
            on_crash=self.on_crash,
            retry_budget=self.retry_budget,
            owner=calling_owner(described),
            logger=self.logger,
        )

    def _handle(self, told: dict[str, Any]) -> DstackRunHandle:
        self.logger.info("Run %s: %s", told["run_name"], told["url"])
        return DstackRunHandle(self, told)


class DstackRunHandle(JobRun[dict[str, Any]]):
    """Watch and stop a run that a ``DstackRun`` submitted; it can be pickled.

    ``run_name``, ``run_id``, ``url`` (of its page) and ``service_url`` (str, None where there is none).
    """

    def __init__(self, block: DstackRun, told: dict[str, Any]) -> None:
        self._block = block
        self._told = told
        self._outcome: dict[str, Any] | None = None

    @property
    def run_name(self) -> str:
        """Return the run's name."""
        return str(self._told["run_name"])

    @property
    def run_id(self) -> str:
        """Return the run's id, unique for ever."""
        return str(self._told["run_id"])

    @property
    def url(self) -> str:
        """Return the address of the run's page."""
        return str(self._told["url"])

    @property
    def service_url(self) -> str | None:
        """Return the address a service answers at, as known when it was submitted."""
        url = self._told["service_url"]
        return None if url is None else str(url)

    def wait_for_completion(self) -> None:  # type: ignore[override]  # Prefect's own integrations do so too
        """Wait for the end of the run and relay its log; a second call returns at once.

        A cancelled or interrupted flow run stops the run, as with ``run_task``; where no signal told of a
        cancellation, ``StopRequested`` is raised, which is no ``Exception``: Prefect takes the task for
        crashed and does not retry it. Raises ``RunFailedError``, ``NoCapacityError`` or
        ``RunStoppedError``, and the server errors.
        """
        if self._outcome is not None:
            return
        job = self._watch()
        with _told(job):
            self._outcome = _follow.execute(
                job,
                self._block.credentials,
                lambda client: _follow.follow(job, self._same(_follow.find(job, client))),
            )

    async def await_for_completion(self) -> None:
        """Wait for the end of the run: the async twin of ``wait_for_completion``."""
        if self._outcome is not None:
            return
        job = self._watch()

        async def body(client: Any) -> dict[str, Any]:
            return await _follow.afollow(job, self._same(await _follow.afind(job, client)))

        with _told(job):
            self._outcome = await _follow.aexecute(job, self._block.credentials, body)

    def fetch_result(self) -> dict[str, Any]:  # type: ignore[override]  # Prefect's own integrations do so too
        """Return the fields of ``dstack_core.Outcome`` as JSON-plain values.

        Raises the run's error when it did not succeed, ``RuntimeError`` while it is not over, and the
        server errors.
        """
        if self._outcome is None:
            with self._client() as client:
                self._outcome = self._result(client.runs.get(self.run_name))
        return self._outcome

    async def afetch_result(self) -> dict[str, Any]:
        """Return the outcome: the async twin of ``fetch_result``."""
        if self._outcome is None:
            async with open_async_client(self._block.credentials, retry_budget=_PATIENCE) as client:
                self._outcome = self._result(await client.runs.get(self.run_name))
        return self._outcome

    def stop(self, abort: bool = False) -> None:
        """Ask the server to stop the run; one that is over is left alone. Does not wait for the end.

        With ``abort`` its processes are killed without the time to end. Raises the server errors.
        """
        with self._client() as client:
            self._same(client.runs.get(self.run_name)).stop(abort=abort)

    async def astop(self, abort: bool = False) -> None:
        """Ask the server to stop the run: the async twin of ``stop``."""
        async with open_async_client(self._block.credentials, retry_budget=_PATIENCE) as client:
            await self._same(await client.runs.get(self.run_name)).stop(abort=abort)

    def _client(self) -> Any:
        return open_client(self._block.credentials, retry_budget=_PATIENCE)

    def _watch(self) -> Job:
        job = prepare_to_watch(
            self._told,
            poll_interval=self._block.poll_interval,
            retry_budget=self._block.retry_budget,
            stream_logs=self._block.stream_logs,
            artifacts=self._block.artifacts,
            owner=calling_owner("wait"),
            logger=self.logger,
        )
        own(job, self._told["marker"])
        return job

    def _same(self, found: Any) -> Any:
        from dstack_core import RunNotFoundError

        if found is None or found.id != self.run_id:
            raise RunNotFoundError(f"run {self.run_name} is gone: {self.url}")
        return found

    def _result(self, found: Any) -> dict[str, Any]:
        outcome = self._same(found).outcome()
        if outcome is None:
            raise RuntimeError(f"run {self.run_name} is not over; call wait_for_completion() first")
        result: dict[str, Any] = outcome.raise_for_status().to_dict()
        return result


_PATIENCE = 30.0


@contextmanager
def _told(job: Job) -> Iterator[None]:
    """Tell in the log of a cancellation that no signal told."""
    try:
        yield
    except StopRequested as request:
        job.logger.warning("%s", job.cancelled(request).message)
        raise
