"""Functions in runs, sync: ``client.functions``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dstack_core import _drive
from dstack_core._function_runs import FunctionRunBase, PreparedCall, defaults_of, options_of, prepare
from dstack_core._operations import Operations
from dstack_core._transport.blocking import BlockingTransport
from dstack_core._wire.runs import RunSnapshot
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
from dstack_core.run import Run

if TYPE_CHECKING:
    from dstack_core._function.modules import ModuleLike
    from dstack_core._function.requirements import RequirementsLike
    from dstack_core._function.result import Serializer


class FunctionCollection:
    """Functions of Python in runs: ``client.functions`` calls one, and returns what it returned."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def run(
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
        """Call a function in a run and return what it returned.

        The function and its arguments travel as files: they are neither in the run's configuration nor in its
        environment nor in a process list. If this call is interrupted, by Ctrl-C, by an error or by its own
        cancellation, it stops its run. The names below are options of this call; for a parameter of the
        function that has such a name, pass ``functools.partial(function, image=...)``.

        Args:
            function: A plain or async function, or a ``functools.partial`` of one.
            *args: Its positional arguments.
            image: The image to run in (str). It needs Python 3.8 or newer. Default: dstack's own.
            python: The Python version of dstack's own image (str). Default: dstack's; for a pickled call
                this Python's.
            commands: What to run before the function (list of str). Default: nothing.
            registry_auth: ``RegistryAuth`` or a mapping, for a private ``image``. Default: none.
            nodes: How many nodes call the function; the first returns. Default: 1.
            configuration: A task, a dict as in YAML or the path of a ``.dstack.yml`` to which the call is
                added. Default: an empty one.
            serializer: With ``"json"`` the function travels as its source, so it imports what it needs inside
                its body, and arguments and result are plain values (tuples become lists). With
                ``"cloudpickle"`` it is pickled with what it refers to; the run needs the package
                ``cloudpickle`` and this Python's minor version, and the result is unpickled here, so the run
                must be one that you trust.
            modules: What the function imports of the own project: modules, packages, or paths of files and
                folders; at most 2 MiB. Ignore files are honoured. Default: none.
            requirements: What the run installs before it calls the function: a list as for pip, or the path
                of a requirements file. Default: nothing.
            cache_dir: The folder in the run that keeps what was installed, such as the path of a volume.
                Default: ``DSTACK_FUNCTION_CACHE`` in the run, else ``~/.cache/dstack-functions``.
            torchrun: Call the function once a GPU under torchrun; the process of rank 0 returns.
            max_result_bytes: The limit for the result, which travels in the run's log. Default 1 MiB.
            allow_cloudpickle: If False, nothing is pickled or unpickled here, as with
                ``DSTACK_FORBID_CLOUDPICKLE=1`` in the environment.
            run_name: The run's name. Default: the function's, with random digits.
            marker: Kept with the run; a run of this name that carries it is used instead of submitting.
                Default: a random one.
            resources: ``Resources``, a mapping or a GPU in its short form. Default: the configuration's.
            env: Environment variables of the run. Default: the configuration's.
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
            retry_budget: Seconds to retry an unreachable server; None: the client's, and 600 for a run that
                is followed.
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
            ``best = client.functions.run(train, 0.1, image="pytorch/pytorch", resources="24GB")``
        """
        # Before any other local name, so that these are the parameters.
        options = options_of(locals())
        prepared = prepare(function, args, kwargs, options, defaults_of(type(self).run))
        submitted = self._submit(prepared)
        try:
            return submitted.result(
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
                self._stop(prepared, submitted.run.id)
            raise

    def submit(
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
    ) -> FunctionRun:
        """Call a function in a run, without waiting for it.

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
            ``runs = [client.functions.submit(train, rate) for rate in (0.1, 0.01)]``
        """
        options = options_of(locals())
        prepared = prepare(function, args, kwargs, options, defaults_of(type(self).submit))
        return self._submit(prepared)

    def _submit(self, prepared: PreparedCall) -> FunctionRun:
        flow = prepared.submit(self._operations)
        try:
            snapshot: RunSnapshot = _drive.run(flow, self._transport)
        except DstackError as error:
            # Of the others the server reported that there is no such run.
            if isinstance(error, ServerUnreachableError):
                self._stop(prepared, None)
            raise
        except BaseException:
            if prepared.may_exist:
                self._stop(prepared, None)
            raise
        run = Run(self._operations, self._transport, snapshot)
        run._is_own = True
        return FunctionRun(prepared.call, prepared.key, run)

    def _stop(self, prepared: PreparedCall, run_id: str | None) -> None:
        _drive.run(prepared.stop(self._operations, run_id), self._transport)


class FunctionRun(FunctionRunBase[Run]):
    """A function that was called in a run, from ``client.functions.submit``."""

    def result(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        on_log: Callable[[str], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        sleep: Callable[[float], None] | None = None,
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
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the wait.

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
            ``value = submitted.result(timeout=3600)``
        """
        reading = self._reading(on_log, on_event)
        flow = self._wait(reading, timeout, poll_interval, retry_budget)
        outcome = _drive.run(flow, self.run._transport, sleep, reading.see)
        return self._value(reading, outcome)

    def stop(
        self,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> StopResult:
        """Stop the run and return what is known of it, as ``Run.stop`` does.

        Args:
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None: the client's retry
                budget, and no limit for the end.
            sleep: A function of seconds, instead of ``time.sleep``.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.
        """
        return self.run.stop(abort, until=until, timeout=timeout, sleep=sleep)
