"""A function whose calls are runs: what ``dstack_task`` was given, checked, and the execution of one call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prefect.context import TaskRunContext

from prefect_dstack import _follow
from prefect_dstack._checks import check_log_budget, check_on_crash, check_pace, check_switches
from prefect_dstack._function_result import FunctionResult
from prefect_dstack._job import Job, prepare, refuse
from prefect_dstack._names import name_of_task
from prefect_dstack._secrets import with_plain_secrets
from prefect_dstack._submission import checked_env, resolve
from prefect_dstack.credentials import CredentialsLike, aload, aload_git, load, load_git

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_core import AsyncClient, Client, Configuration
    from dstack_core.integration import FunctionCall
    from prefect_dstack._secrets import GitLogin

# The options that a configuration has under the same names, so that its model checks them.
_OF_CONFIGURATION = ("resources", "spot_policy", "max_duration", "max_price", "working_dir", "backends")


@dataclass(frozen=True, slots=True)
class RemoteFunction:
    """A function and how its calls are run; nothing is read or submitted before a call.

    ``packing`` are options of ``FunctionCall.pack``, ``machine`` fields of the configuration, ``following``
    arguments of ``prepare``, ``options`` those of every submission. None in them counts as not given.
    """

    function: Callable[..., Any]
    credentials: CredentialsLike
    configuration: Any = field(repr=False)
    packing: Mapping[str, Any] = field(repr=False)
    machine: Mapping[str, Any] = field(repr=False)
    following: Mapping[str, Any] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    def check(self) -> None:
        """Raise ``ConfigurationError`` for what is wrong with any arguments; reads the source."""
        from dstack_core import ConfigurationError, Task, check_callbacks
        from dstack_core.integration import (
            FunctionCall,
            check_mask_env,
            check_max_cost,
            check_tags,
            hold_seconds,
            host_fallbacks,
            read_survive,
        )

        function, following = self.function, self.following
        if not inspect.isfunction(function):
            refuse(
                f"dstack_task: expected a function (def or async def), got {type(function).__name__}. "
                "Write @dstack_task(...) directly above the def."
            )
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            refuse(
                f"{function.__name__}: expected a function that returns its value, got a generator. "
                "Return a list."
            )
        limits = {name: self.packing[name] for name in ("serializer", "max_result_bytes")}
        FunctionCall.check(function, **limits)
        check_pace(following["poll_interval"], following["retry_budget"])
        check_log_budget(following["log_budget_bytes"])
        check_callbacks(following["callbacks"])
        check_on_crash(following["on_crash"])
        switches = {name: following[name] for name in ("stream_logs", "log_timestamps", "artifacts")}
        check_switches(**switches, torchrun=self.packing["torchrun"])
        checked_env(self.options.get("env"))
        check_mask_env(self.options.get("mask_env") or "secrets")
        hold_seconds(self.options.get("debug_on_failure"))
        if self.options.get("max_cost") is not None:
            check_max_cost(self.options["max_cost"])
        tags = self.options.get("tags")
        if tags is not None and tags is not False:
            check_tags("tags", tags)
        fallbacks = host_fallbacks(self.options.get("fallbacks"), self.options.get("fallback_on_exit"))
        steps = [self.options, *(() if fallbacks is None else fallbacks.options)]
        for number, step in enumerate(steps):
            given = {name: step.get(name) for name in _OF_CONFIGURATION}
            try:
                read_survive(step.get("survive"))
                Task.model_validate(_given({**with_plain_secrets(self.machine), **given}))
            except ConfigurationError as error:
                # The decorator has these options; there is no Task in the user's code.
                where = f"fallbacks[{number - 1}]: " if number else ""
                refuse(where + error.message.removeprefix("Task."))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call in a run, as the task that is current, and return what it returned."""
        block = load(self.credentials)
        job, function = self._prepare(args, kwargs, load_git(block, self.options.get("git_credentials")))

        def body(client: Client) -> Any:
            run = _follow.watch(job, client, _follow.submit(job, client))
            for pause in function.pauses(job):
                job.sleep(pause)
                for event in run.follow(**_reading(job), sleep=job.sleep):
                    function.take(event)
                if not function.pauses(job):
                    break
            return function.value(job)

        return _follow.execute_task(job, block, body)

    async def acall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call in a run: the twin of ``call``."""
        block = await aload(self.credentials)
        login = await aload_git(block, self.options.get("git_credentials"))
        job, function = await asyncio.to_thread(self._prepare, args, kwargs, login)

        async def body(client: AsyncClient) -> Any:
            run = await _follow.awatch(job, client, await _follow.asubmit(job, client))
            for pause in function.pauses(job):
                await job.asleep(pause)
                async for event in run.follow(**_reading(job), sleep=job.asleep):
                    function.take(event)
                if not function.pauses(job):
                    break
            return function.value(job)

        return await _follow.aexecute_task(job, block, body)

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], login: GitLogin
    ) -> tuple[Job, FunctionResult]:
        from dstack_core.integration import FunctionCall

        call = FunctionCall.pack(self.function, args, kwargs, **self.packing)
        configuration = {"type": "task"} if self.configuration is None else self.configuration
        submission = resolve(configuration, self.options, login)
        base = self._base(submission.configuration, call)
        described = {**submission.described, "configuration": base.model_dump(mode="json")}
        password = None if base.registry_auth is None else base.registry_auth.password
        function = FunctionResult(call)
        job = prepare(
            replace(
                submission,
                configuration=base,
                described={**described, "function": call.fingerprint},
                secrets=[*submission.secrets, *([password] if password else [])],
            ),
            run_name=None,
            **self.following,
        )
        job.function = function
        return job, function

    def _task_name(self) -> str | None:
        """Return the name of the current task, if it is not that of the function."""
        context = TaskRunContext.get()
        name = None if context is None else name_of_task(context.task)
        return None if name == self.function.__name__ else name

    def _base(self, configuration: Configuration, call: FunctionCall) -> Configuration:
        """Return the configuration with the image and what else was given beside it, named after the call."""
        from dstack_core.integration import slug

        if configuration.type != "task":
            refuse(f"configuration: expected a task, got a {configuration.type}.")
        given = _given(with_plain_secrets(self.machine))
        if commands := given.pop("commands", None):
            added = [commands] if isinstance(commands, str) else commands
            given["commands"] = [*(configuration.commands or []), *added]
        name = configuration.name or slug(self._task_name() or call.name, default="function")
        fields = {each: getattr(configuration, each) for each in configuration.model_fields_set}
        return type(configuration).model_validate({**fields, **given, "name": name})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _reading(job: Job) -> dict[str, Any]:
    """Return how the log of a run that has ended is read again, for what was late."""
    return {
        "poll_interval": job.poll_interval,
        "retry_budget": job.retry_budget,
        "report_limits": job.report_limits,
    }
