"""Functions in runs, async: the twin of ``functions``.

Packing reads files, so it happens in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dstack_core import _adrive
from dstack_core._function_runs import FunctionRunBase, PreparedCall, defaults_of, options_of, prepare
from dstack_core._operations import Operations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._wire.runs import RunSnapshot
from dstack_core.aio_run import AsyncRun
from dstack_core.configurations import ConfigurationLike
from dstack_core.errors import DstackError, ServerUnreachableError
from dstack_core.models.configurations import RegistryAuth
from dstack_core.models.events import Event
from dstack_core.models.outcome import RunError
from dstack_core.models.profiles import Profile, RetryPolicy
from dstack_core.models.reports import DEFAULT_MAX_BYTES
from dstack_core.models.resources import Resources
from dstack_core.models.statuses import SpotPolicy
from dstack_core.models.stops import StopResult
from dstack_core.models.survive import Survive

if TYPE_CHECKING:
    from dstack_core._function.modules import ModuleLike
    from dstack_core._function.requirements import RequirementsLike
    from dstack_core._function.result import Serializer


class AsyncFunctionCollection:
    """Functions of Python in runs: ``client.functions`` calls one, and returns what it returned."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def run(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        image: str | None = None,
        python: str | None = None,
        commands: Sequence[str] = (),
        registry_auth: RegistryAuth | Mapping[str, str] | None = None,
        nodes: int | None = None,
        configuration: ConfigurationLike | None = None,
        serializer: Serializer = "json",
        modules: Iterable[ModuleLike] | ModuleLike = (),
        requirements: RequirementsLike = (),
        cache_dir: str | None = None,
        torchrun: bool = False,
        max_result_bytes: int = DEFAULT_MAX_BYTES,
        allow_cloudpickle: bool = True,
        run_name: str | None = None,
        marker: str | None = None,
        resources: Resources | Mapping[str, Any] | str | int | None = None,
        env: Mapping[str, str] | None = None,
        profile: str | Profile | None = None,
        spot_policy: SpotPolicy | str | None = None,
        retry_policy: RetryPolicy | Mapping[str, Any] | bool | None = None,
        max_duration: int | str | None = None,
        max_price: float | None = None,
        working_dir: str | None = None,
        backends: list[str] | None = None,
        reports: bool | None = True,
        survive: Survive | Mapping[str, Any] | int | str | bool | None = None,
        tags: Mapping[str, str] | Literal[False] | None = None,
        max_cost: float | None = None,
        debug_on_failure: int | str | None = None,
        retry_budget: float | None = None,
        poll_interval: float = 5.0,
        on_log: Callable[[str], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call a function in a run and return what it returned: the twin of ``FunctionCollection.run``.

        Args:
            function: A plain or async function, or a ``functools.partial`` of one.
            *args: Its positional arguments.
            image: The image to run in (str). Default: dstack's own.
            python: The Python version of dstack's own image (str).
            commands: What to run before the function (list of str).
            registry_auth: ``RegistryAuth`` or a mapping, for a private ``image``.
            nodes: How many nodes call the function; the first returns.
            configuration: A task, a dict or the path of a ``.dstack.yml`` to which the call is added.
            serializer: ``"json"``, or ``"cloudpickle"`` for a run that you trust.
            modules: What the function imports of the own project: modules, packages or paths.
            requirements: What the run installs before it calls the function: a list, or a file's path.
            cache_dir: The folder in the run that keeps what was installed.
            torchrun: Call the function once a GPU under torchrun; the process of rank 0 returns.
            max_result_bytes: The limit for the result. Default 1 MiB.
            allow_cloudpickle: If False, nothing is pickled or unpickled here.
            run_name: The run's name. Default: the function's, with random digits.
            marker: Kept with the run; a run of this name that carries it is used instead of submitting.
            resources: ``Resources``, a mapping or a GPU in its short form.
            env: Environment variables of the run.
            profile: The name of a profile, or a ``Profile``.
            spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``.
            retry_policy: A ``RetryPolicy``, True, False or a mapping: whether to wait for capacity.
            max_duration: The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``.
            max_price: The highest price, in USD per hour.
            working_dir: Where the function starts.
            backends: The only backends to take machines from.
            reports: Whether the function can import ``dstack_report``. Default: True.
            survive: What the run survives, such as an interruption: a ``Survive``, a mapping or a duration.
            tags: Tags that the run's machine gets at its cloud; False: none. Default: those of the client.
            max_cost: The most that the run may cost in all, in USD; it is stopped there. Default: no limit.
            debug_on_failure: How long the container is held after the function has failed, for a shell in
                it: seconds or ``"30m"``. Default: not at all.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            poll_interval: Seconds between two status requests.
            on_log: Gets each line of the run's log (str), which is what the function prints.
            on_event: Gets the events of following the run, such as ``Reported``.
            **kwargs: The function's keyword arguments.

        Returns:
            What the function returned.

        Raises:
            RemoteFunctionError: The function raised.
            UnusableFunctionError: The call cannot work as it is: the image has no Python, or the result
                cannot travel.
            FunctionSkipped: The function ended with ``dstack_report.skip``.
            RunError: The run ended without success for another reason; a function that ends with
                ``sys.exit(3)`` is a ``RunFailedError`` with this exit status.
            NoResultError: The run succeeded, but its log holds no result.
            ConfigurationError: Something is wrong or cannot travel; nothing was submitted.
            ServerError: The server errors.

        Example:
            ``best = await client.functions.run(train, 0.1, image="pytorch/pytorch", resources="24GB")``
        """
        # Before any other local name, so that these are the parameters.
        options = options_of(locals())
        prepared = await asyncio.to_thread(
            prepare, function, args, kwargs, options, defaults_of(type(self).run)
        )
        submitted = await self._submit(prepared)
        try:
            return await submitted.result(
                poll_interval=poll_interval,
                retry_budget=600.0 if retry_budget is None else retry_budget,
                on_log=on_log,
                on_event=on_event,
            )
        except RunError:
            raise
        except BaseException:
            # The caller has no handle of the run, so nothing else would stop it.
            if submitted.run.last_status.is_active and not submitted.run._is_held:
                await self._stop(prepared, submitted.run.id)
            raise

    async def submit(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        image: str | None = None,
        python: str | None = None,
        commands: Sequence[str] = (),
        registry_auth: RegistryAuth | Mapping[str, str] | None = None,
        nodes: int | None = None,
        configuration: ConfigurationLike | None = None,
        serializer: Serializer = "json",
        modules: Iterable[ModuleLike] | ModuleLike = (),
        requirements: RequirementsLike = (),
        cache_dir: str | None = None,
        torchrun: bool = False,
        max_result_bytes: int = DEFAULT_MAX_BYTES,
        allow_cloudpickle: bool = True,
        run_name: str | None = None,
        marker: str | None = None,
        resources: Resources | Mapping[str, Any] | str | int | None = None,
        env: Mapping[str, str] | None = None,
        profile: str | Profile | None = None,
        spot_policy: SpotPolicy | str | None = None,
        retry_policy: RetryPolicy | Mapping[str, Any] | bool | None = None,
        max_duration: int | str | None = None,
        max_price: float | None = None,
        working_dir: str | None = None,
        backends: list[str] | None = None,
        reports: bool | None = True,
        survive: Survive | Mapping[str, Any] | int | str | bool | None = None,
        tags: Mapping[str, str] | Literal[False] | None = None,
        max_cost: float | None = None,
        debug_on_failure: int | str | None = None,
        retry_budget: float | None = None,
        **kwargs: Any,
    ) -> AsyncFunctionRun:
        """Call a function in a run, without waiting for it: the twin of ``FunctionCollection.submit``.

        Args:
            function: A plain or async function, or a ``functools.partial`` of one.
            *args: Its positional arguments.
            image: The image to run in (str). Default: dstack's own.
            python: The Python version of dstack's own image (str).
            commands: What to run before the function (list of str).
            registry_auth: ``RegistryAuth`` or a mapping, for a private ``image``.
            nodes: How many nodes call the function; the first returns.
            configuration: A task, a dict or the path of a ``.dstack.yml`` to which the call is added.
            serializer: ``"json"``, or ``"cloudpickle"`` for a run that you trust.
            modules: What the function imports of the own project: modules, packages or paths.
            requirements: What the run installs before it calls the function: a list, or a file's path.
            cache_dir: The folder in the run that keeps what was installed.
            torchrun: Call the function once a GPU under torchrun; the process of rank 0 returns.
            max_result_bytes: The limit for the result. Default 1 MiB.
            allow_cloudpickle: If False, nothing is pickled or unpickled here.
            run_name: The run's name. Default: the function's, with random digits.
            marker: Kept with the run; a run of this name that carries it is used instead of submitting.
            resources: ``Resources``, a mapping or a GPU in its short form.
            env: Environment variables of the run.
            profile: The name of a profile, or a ``Profile``.
            spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``.
            retry_policy: A ``RetryPolicy``, True, False or a mapping: whether to wait for capacity.
            max_duration: The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``.
            max_price: The highest price, in USD per hour.
            working_dir: Where the function starts.
            backends: The only backends to take machines from.
            reports: Whether the function can import ``dstack_report``. Default: True.
            survive: What the run survives, such as an interruption: a ``Survive``, a mapping or a duration.
            tags: Tags that the run's machine gets at its cloud; False: none. Default: those of the client.
            max_cost: The most that the run may cost in all, in USD; it is stopped there. Default: no limit.
            debug_on_failure: How long the container is held after the function has failed, for a shell in
                it: seconds or ``"30m"``. Default: not at all.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            **kwargs: The function's keyword arguments.

        Returns:
            The running function; ``result()`` waits for what it returns.

        Raises:
            ConfigurationError: Something is wrong or cannot travel; nothing was submitted.
            ServerError: The server errors.

        Example:
            ``runs = [await client.functions.submit(train, rate) for rate in (0.1, 0.01)]``
        """
        options = options_of(locals())
        prepared = await asyncio.to_thread(
            prepare, function, args, kwargs, options, defaults_of(type(self).submit)
        )
        return await self._submit(prepared)

    async def _submit(self, prepared: PreparedCall) -> AsyncFunctionRun:
        flow = await asyncio.to_thread(prepared.submit, self._operations)
        try:
            snapshot: RunSnapshot = await _adrive.arun(flow, self._transport)
        except DstackError as error:
            # Of the others the server reported that there is no such run.
            if isinstance(error, ServerUnreachableError):
                await self._stop(prepared, None)
            raise
        except BaseException:
            if prepared.may_exist:
                await self._stop(prepared, None)
            raise
        run = AsyncRun(self._operations, self._transport, snapshot)
        run._is_own = True
        return AsyncFunctionRun(prepared.call, prepared.key, run)

    async def _stop(self, prepared: PreparedCall, run_id: str | None) -> None:
        await _adrive.arun(prepared.stop(self._operations, run_id), self._transport)


class AsyncFunctionRun(FunctionRunBase[AsyncRun]):
    """A function that was called in a run, from ``client.functions.submit``."""

    async def result(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        on_log: Callable[[str], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> Any:
        """Wait until the run has ended and return what the function returned.

        Interrupting this does not stop the run; ``stop()`` does.

        Args:
            timeout: Seconds to wait, None for no limit. Requests end with it, too.
            poll_interval: Seconds between two status requests.
            retry_budget: Seconds for which an unreachable server is retried.
            on_log: Gets each line of the run's log (str), which is what the function prints.
            on_event: Gets the events of following the run. Default: the ``dstack_core`` logger reports lost
                contact.
            sleep: An async function of seconds, instead of ``asyncio.sleep``; what it raises ends the wait.

        Returns:
            What the function returned.

        Raises:
            WaitTimeoutError: The timeout passed; the run keeps running.
            RemoteFunctionError: The function raised.
            UnusableFunctionError: The call cannot work as it is.
            FunctionSkipped: The function ended with ``dstack_report.skip``.
            RunError: The run ended without success for another reason.
            NoResultError: The run succeeded, but its log holds no result.
            ServerError: The server errors.

        Example:
            ``value = await submitted.result(timeout=3600)``
        """
        reading = self._reading(on_log, on_event)
        flow = self._wait(reading, timeout, poll_interval, retry_budget)
        outcome = await _adrive.arun(flow, self.run._transport, sleep, reading.see, self.run._waits(sleep))
        return self._value(reading, outcome)

    async def stop(
        self,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> StopResult:
        """Stop the run and return what is known of it, as ``AsyncRun.stop`` does.

        Args:
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None: the client's retry
                budget, and no limit for the end.
            sleep: An async function of seconds, instead of ``asyncio.sleep``.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.
        """
        return await self.run.stop(abort, until=until, timeout=timeout, sleep=sleep)
