"""A run as a block: its configuration saved in Prefect, triggered from any flow, task or script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from prefect.blocks.abstract import JobBlock
from prefect.types import SecretDict
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from prefect_dstack import _follow
from prefect_dstack._block_submission import git_of_block, submission_of_block
from prefect_dstack._callbacks import check_paths
from prefect_dstack._follow import info
from prefect_dstack._job import Job, prepare
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._names import calling_owner
from prefect_dstack._secrets import GitLogin, login_of, names_of_secrets, with_plain_secrets
from prefect_dstack._submission import DEFAULT_REPORTS
from prefect_dstack._tags import one_kind_of_tags
from prefect_dstack.credentials import DstackCredentials, aload_git, load_git
from prefect_dstack.run_handle import DstackRunHandle, cancellation_logged

if TYPE_CHECKING:
    from prefect_dstack.run_dict import RunDict


class DstackRun(JobBlock[dict[str, Any]]):
    """A configuration to run on dstack: a task or a service, as it is written in ``.dstack.yml``.

    ``trigger`` submits it and returns a ``DstackRunHandle``. Within a flow, executing the same flow run
    again reattaches to its active run and takes over its successful one, as with ``run_task``. Without a
    ``max_duration`` a run gets 24 h, so that no run stays without a limit. The options are those of
    ``run_task``; ``env`` and ``git_credentials`` are stored as secrets, ``configuration`` is not. A wrong
    value raises pydantic's ``ValidationError``. Source: Prefect's documentation, "Blocks".

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
    resources: dict[str, Any] | str | int | None = Field(
        default=None, description="What the machine must have, such as {gpu: 24GB.., memory: 32GB..}."
    )
    spot_policy: Literal["spot", "on-demand", "auto"] | None = Field(
        default=None, description="Whether spot instances are taken; without it on-demand ones are."
    )
    retry_policy: bool | dict[str, Any] | None = Field(
        default=None, description="When dstack tries again, such as {on_events: [no-capacity], duration: 1h}."
    )
    max_duration: int | str | None = Field(
        default=None,
        description="When the run is stopped at the latest: seconds, 2h, or off; 24 h by default.",
    )
    max_price: float | None = Field(default=None, gt=0, description="The highest price, in USD per hour.")
    max_cost: float | None = Field(
        default=None, gt=0, description="The most that the run may cost in all, in USD; it is stopped there."
    )
    working_dir: str | None = Field(
        default=None, description="Where commands start, relative to the code's directory, or absolute."
    )
    backends: list[str] | None = Field(default=None, description="The only clouds to take machines from.")
    env: SecretDict | None = Field(
        default=None,
        description="Environment variables, stored as secrets; they fill in and override those of the keys.",
    )
    args: list[str] | None = Field(
        default=None, description="What ${{ run.args }} in the commands stands for."
    )
    profile: str | None = Field(
        default=None, description="Name of a profile; without one the file's default profile counts."
    )
    tags: dict[str, str] | bool | None = Field(
        default=None,
        description="Tags of the machine at its cloud, beside the automatic ones; off for no tags at all.",
    )
    profiles_file: str | None = Field(
        default=None, description="File of profiles; without one .dstack/profiles.yml in the repo_dir."
    )
    repo_dir: str | None = Field(
        default=None, description="Directory whose contents the run gets; it is on the flow run's machine."
    )
    local_repo: bool = Field(
        default=False, description="Whether a Git checkout is uploaded instead of cloned by the run."
    )
    git_credentials: SecretStr | None = Field(
        default=None,
        description="<block type>/<name> of a block with a Git token or key; else those of the credentials.",
    )
    poll_interval: float = Field(
        default=5.0, gt=0, description="Seconds between two status requests while it is waited for."
    )
    retry_budget: float = Field(
        default=600.0, ge=0, description="Seconds to keep retrying while the dstack server is unreachable."
    )
    stream_logs: bool = Field(
        default=True, description="Whether the run's log lines are sent to the run logger."
    )
    log_budget_bytes: int | None = Field(
        default=DEFAULT_LOG_BUDGET, ge=0, description="Bytes of log that are sent at most; empty for all."
    )
    log_timestamps: bool = Field(
        default=False, description="Whether each line begins with the time at which the server logged it."
    )
    artifacts: bool = Field(
        default=True, description="Whether the run is shown in the artifacts of its flow run."
    )
    callbacks: list[str] | None = Field(
        default=None,
        description="Paths of classes that are called while the run is followed: my_package.alerts.Alerts.",
    )
    mask_env: Literal["secrets", "all", "none"] | list[str] = Field(
        default="secrets",
        description="Which values of env are masked: secrets, all, none, or names beside those of secrets.",
    )
    secret_names: list[str] = Field(
        default_factory=list,
        description="Variables that were given as secrets, which the block adds itself.",
    )
    reports: bool | None = Field(
        default=DEFAULT_REPORTS,
        description="Whether the run gets $DSTACK_RESULT_FILE and the module dstack_report.",
    )
    survive: dict[str, Any] | str | int | bool | None = Field(
        default=None,
        description="What the run survives, such as an interruption: 4h in all, or {duration: 4h, times: 5}.",
    )
    fallbacks: list[dict[str, Any]] | None = Field(
        default=None,
        description="Options of further runs, after one ended for lack of a machine: [{max_price: 5}].",
    )
    fallback_on_exit: dict[int, int | Literal["next"]] | None = Field(
        default=None, description="Exit statuses that lead to another of the fallbacks, too: {137: next}."
    )
    debug_on_failure: int | str | None = Field(
        default=None,
        description="How long the container is held after a failure, for a shell in it: seconds or 30m.",
    )

    @field_validator("configuration")
    @classmethod
    def _is_understood(cls, value: dict[str, Any]) -> dict[str, Any]:
        from dstack_core import ConfigurationError, load_configuration

        try:
            load_configuration(with_plain_secrets(value))
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return value

    @model_validator(mode="after")
    def _has_fallbacks(self) -> Self:
        from dstack_core import ConfigurationError
        from dstack_core.integration import host_fallbacks

        try:
            host_fallbacks(self.fallbacks, self.fallback_on_exit)
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return self

    @field_validator("tags", mode="before")
    @classmethod
    def _is_one_kind_of_tags(cls, value: Any) -> Any:
        return one_kind_of_tags(value)

    @field_validator("callbacks")
    @classmethod
    def _callbacks_are_paths(cls, value: list[str] | None) -> list[str] | None:
        return check_paths(value)

    @model_validator(mode="before")
    @classmethod
    def _with_secret_names(cls, data: Any) -> Any:
        # A block is saved with texts: what was a secret of its own is known by its name from then on.
        if not isinstance(data, Mapping):
            return data
        configuration = data.get("configuration")
        env = configuration.get("env") if isinstance(configuration, Mapping) else None
        found = names_of_secrets(data.get("env")) | names_of_secrets(env)
        known = set(data.get("secret_names") or ())
        return {**data, "secret_names": sorted(found | known)} if found - known else data

    @field_validator("env", mode="before")
    @classmethod
    def _env_as_text(cls, value: Any) -> Any:
        # The field is a secret as a whole; secrets inside it would be stored as ***.
        return with_plain_secrets(value)

    @field_validator("git_credentials", mode="before")
    @classmethod
    def _login_as_text(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | SecretStr):
            return value
        from dstack_core import ConfigurationError

        try:
            login = login_of(value)
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return login.private_key or login.token

    def trigger(self) -> DstackRunHandle:  # type: ignore[override]  # Prefect's own integrations do so too
        """Submit the run and return it without waiting.

        Raises ``ConfigurationError``, the server errors, and ``StopRequested`` (not an ``Exception``) in a
        flow run that was cancelled or has failed: then nothing is submitted.
        """
        job = self._job(load_git(self.credentials, git_of_block(self)))

        def body(client: Any) -> DstackRunHandle:
            return self._handle(job, info(_follow.submit_only(job, client)))

        with cancellation_logged(job):
            return _follow.execute(job, self.credentials, body)

    async def atrigger(self) -> DstackRunHandle:
        """Submit the run and return it: the async twin of ``trigger``."""
        job = self._job(await aload_git(self.credentials, git_of_block(self)))

        async def body(client: Any) -> DstackRunHandle:
            return self._handle(job, info(await _follow.asubmit_only(job, client)))

        with cancellation_logged(job):
            return await _follow.aexecute(job, self.credentials, body)

    def _job(self, login: GitLogin) -> Job:
        submission = submission_of_block(self, login)
        described = json.dumps(
            [submission.described, self.run_name, self.on_crash], sort_keys=True, default=str
        )
        return prepare(
            submission,
            run_name=self.run_name,
            on_crash=self.on_crash,
            retry_budget=self.retry_budget,
            callbacks=self.callbacks,
            owner=calling_owner(described),
            logger=self.logger,
        )

    def _handle(self, job: Job, run: RunDict) -> DstackRunHandle:
        self.logger.info("Run %s: %s", run["run_name"], run["url"])
        return DstackRunHandle(self, run, job.attempt.first or job.attempt.ref)
