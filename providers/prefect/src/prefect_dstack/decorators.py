"""The decorator ``dstack``: a flow that runs on a machine, without a deployment and without a bucket.

It stands beside Prefect's own infrastructure decorators (``@kubernetes``, ``@ecs``) and makes a flow of the
same class, so that ``prefect flow-run retry`` works with it. What differs: Prefect's need a bucket for bundle
and result. Here the bundle travels in the run's upload (``_bundles``), the result in an artifact
(``_flow_result``), and the process that calls the flow watches the machine (``_remote_call``).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypedDict, TypeVar, Unpack

from prefect import Flow, State
from prefect.flows import InfrastructureBoundFlow
from prefect.futures import PrefectFuture, resolve_futures_to_results
from prefect.utilities.callables import get_call_parameters

from prefect_dstack import _bundles
from prefect_dstack._callbacks import paths_and_own
from prefect_dstack._flow_runs import check_pool, create_flow_run, in_thread
from prefect_dstack._remote_call import RemoteCall
from prefect_dstack._worker_variables import DstackVariables
from prefect_dstack.credentials import CredentialsLike, DstackCredentials
from prefect_dstack.flow_future import DstackFlowRunFuture
from prefect_dstack.worker import DstackWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from dstack_core import CallbacksLike

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_POOL = "dstack"


class MachineOptions(TypedDict, total=False):
    """The variables of a work pool of type ``dstack`` that a flow sets; ``docs/prefect.md`` explains them."""

    image: str | None
    """What the machine runs in, with Prefect. Default: Prefect's own image of this version."""
    resources: dict[str, Any] | str | int | None
    """What the machine must have, such as ``"24GB.."`` or ``{"gpu": "H100:2"}``."""
    env: Mapping[str, str | None]
    """Environment variables; a value may be ``"{{ prefect.blocks.secret.NAME }}"``."""
    spot_policy: str | None
    """``spot``, ``on-demand`` or ``auto``. Default: ``on-demand``."""
    max_price: float | None
    """The highest price, in USD per hour."""
    max_cost: float | None
    """The most that the machine may cost in all, in USD; it is stopped there. Default: no limit."""
    max_duration: int | str | None
    """When the machine is stopped at the latest: seconds, ``"2h"``, ``"off"``. Default: 24 h."""
    survive: Mapping[str, Any] | str | int | bool | None
    """What the flow run survives, such as an interruption: for how long, ``"4h"``, or a dict with more."""
    debug_on_failure: int | str | None
    """How long the machine stays after its commands have failed, for a shell in it: seconds or ``"30m"``."""
    retry: bool | Mapping[str, Any] | None
    """When dstack tries again. Default: never."""
    backends: Sequence[str] | None
    """The only clouds to take machines from."""
    working_dir: str | None
    """Where the commands start."""
    profile: str | None
    """The name of a profile."""
    tags: Mapping[str, str] | bool | None
    """Tags of the machine at its cloud, beside the automatic ones; False for no tags at all."""
    profiles_file: str | None
    """The file of profiles."""
    repo_dir: str | None
    """An absolute path of a directory that the machine gets."""
    local_repo: bool
    """Upload a Git checkout instead of cloning it."""
    git_credentials: str | Mapping[str, Any] | None
    """``<block type>/<name>`` of a block with a Git token or key."""
    configuration: Mapping[str, Any]
    """Further keys of a ``.dstack.yml``, such as ``fleets`` or ``volumes``."""
    stream_output: bool
    """Send what the machine prints to the flow run's log. Default: True."""
    log_budget_bytes: int | None
    """Bytes of the output that are sent at most."""
    log_timestamps: bool
    """Begin each line with the time at which the server logged it. Default: False."""
    poll_interval: float
    """Seconds between two status requests. Default: 5."""
    callbacks: CallbacksLike
    """What is called while the machine is watched: a class with methods of ``dstack_core.RunCallbacks``, its
    path, an instance, or a list of those. A worker of the pool can call only what it can import."""
    mask_env: str | Sequence[str]
    """Which values of ``env`` are masked: ``"secrets"`` (default), ``"all"``, ``"none"``, or names."""


def dstack(
    work_pool: str = DEFAULT_POOL,
    *,
    credentials: CredentialsLike = None,
    commands: Sequence[str] = (),
    **options: Unpack[MachineOptions],
) -> Callable[[Flow[P, R]], DstackFlow[P, R]]:
    """Run a flow on a machine that dstack provisions: put it on top of ``@flow``.

    Calling the flow submits the machine, waits for its end and returns what the flow returned, or raises what
    it raised. It is one flow run, whose state, log and task runs are in Prefect. If the call is interrupted,
    its machine is stopped. ``submit`` returns a future once the machine is submitted, ``submit_to_work_pool``
    leaves the flow run to a worker of the pool.

    Args:
        work_pool: A work pool of type ``dstack``, whose values hold where no option is given. It is
            created if it does not exist. Default: ``"dstack"``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the work pool's, else
            the environment's. ``submit_to_work_pool`` needs a name or None.
        commands: Shell commands that run on the machine before the flow, such as ``pip install``.
        **options: The machine, as ``MachineOptions`` describes it.

    Returns:
        A decorator of flows.

    Raises:
        ConfigurationError: An option has a wrong value.
        TypeError: An option does not exist.

    Example:
        ```python
        from prefect import flow
        from prefect_dstack import dstack

        @dstack(resources="24GB..", max_duration="2h")
        @flow
        def train(epochs: int) -> float:
            return 0.93

        accuracy = train(epochs=3)
        ```
    """
    if not isinstance(work_pool, str) or not work_pool:
        given = getattr(work_pool, "__name__", work_pool)
        _refuse(
            f"work_pool: expected the name of a work pool, got {given!r}. "
            "Write @dstack() with parentheses above @flow."
        )
    given = dict(options)
    paths, own = paths_and_own(given.pop("callbacks", None))
    if paths:
        given["callbacks"] = paths
    variables = _variables(credentials, commands, given)
    block = credentials if isinstance(credentials, DstackCredentials) else None

    def decorate(flow: Flow[P, R]) -> DstackFlow[P, R]:
        if not isinstance(flow, Flow):
            _refuse(
                f"dstack: expected a flow, got {getattr(flow, '__name__', flow)!r}. "
                "Write @dstack(...) above @flow."
            )
        return DstackFlow.bind(flow, work_pool, variables, block, own)

    return decorate


class DstackFlow(InfrastructureBoundFlow[P, R], Generic[P, R]):
    """A flow that runs on a machine; ``dstack`` makes it.

    ``plain`` (Flow) is the flow without a machine. ``credentials`` is a block that only this process has,
    else None. ``callbacks`` (list) are classes and instances that only this process has.
    """

    plain: Flow[P, R]
    credentials: DstackCredentials | None
    callbacks: list[Any]

    @classmethod
    def bind(
        cls,
        flow: Flow[P, R],
        work_pool: str,
        job_variables: dict[str, Any],
        credentials: DstackCredentials | None,
        callbacks: Sequence[Any] = (),
    ) -> DstackFlow[P, R]:
        """Return a copy of ``flow`` that runs on a machine with these variables of its work pool."""
        new = cls(flow.fn, work_pool=work_pool, job_variables=job_variables, worker_cls=DstackWorker)
        # As Prefect's ``bind_flow_to_infrastructure`` does it.
        vars(new).update(vars(flow))
        new.work_pool, new.job_variables, new.worker_cls = work_pool, job_variables, DstackWorker
        new.plain, new.credentials, new.callbacks = flow, credentials, list(callbacks)
        return new

    @property
    def carries_result(self) -> bool:
        """Whether the result comes as an artifact; a flow with a result storage has it there."""
        return self.result_storage is None

    # For a type checker the overloads of Prefect's class hold.
    if not TYPE_CHECKING:

        def __call__(self, *args, return_state=False, wait_for=None, **kwargs):
            """Run the flow on a machine; return its result, or its state with ``return_state``."""
            return self._call(args, kwargs, return_state, wait_for)

    def _call(
        self, args: Any, kwargs: Any, return_state: bool, wait_for: Iterable[PrefectFuture[Any]] | None
    ) -> Any:
        if inspect.iscoroutinefunction(self.fn):
            return self._acall(args, kwargs, return_state, wait_for)
        for future in wait_for or ():
            future.wait()
        call = RemoteCall(self, self._given(args, kwargs))
        call.wait()
        future_of_run = self._future(call)
        future_of_run.wait()
        return future_of_run.state if return_state else future_of_run.result()

    async def _acall(
        self, args: Any, kwargs: Any, return_state: bool, wait_for: Iterable[PrefectFuture[Any]] | None
    ) -> Any:
        for future in wait_for or ():
            await asyncio.to_thread(future.wait)
        call = RemoteCall(self, self._given(args, kwargs))
        await call.await_end()
        future_of_run = self._future(call)
        await future_of_run.wait_async()
        return await future_of_run.final_state() if return_state else await future_of_run.aresult()

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> DstackFlowRunFuture[R]:
        """Submit the machine and return a future; the flow run keeps running if this process ends.

        This process watches the machine while it lives, then a worker of the pool, if there is one. Raises
        what the submission raises.
        """
        call = RemoteCall(self, self._given(args, kwargs))
        call.wait(submitted=True)
        return self._future(call)

    async def retry(self, flow_run: FlowRun) -> R | State[R]:
        """Execute a flow run again, on a new machine: what ``prefect flow-run retry`` calls."""
        call = RemoteCall(self, dict(flow_run.parameters), flow_run)
        await call.await_end()
        result: R = await self._future(call).aresult()
        return result

    def submit_to_work_pool(self, *args: P.args, **kwargs: P.kwargs) -> DstackFlowRunFuture[R]:
        """Create the flow run for a worker of the pool and return a future.

        Raises:
            ConfigurationError: ``credentials`` is a block, a callback cannot be imported by a worker, the
                flow cannot be pickled, or it is larger than 5 MB.
        """
        from dstack_core import check_callbacks

        check_callbacks(self.callbacks, by_path=True)
        if self.credentials is not None:
            _refuse(
                "credentials: expected the name of a saved block or None for the worker's environment, got a "
                "block. Save it, and pass its name."
            )
        return in_thread(self._submit_to_worker(self._given(args, kwargs))).result()

    async def _submit_to_worker(self, parameters: dict[str, Any]) -> DstackFlowRunFuture[R]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.exceptions import ObjectNotFound
        from prefect.states import Crashed, Scheduled

        variables = {**self.job_variables, _bundles.VARIABLE: _bundles.IN_ARTIFACT}
        async with get_client() as client:
            try:
                pool = await client.read_work_pool(self.work_pool)
            except ObjectNotFound:
                template = DstackWorker.get_default_base_job_template()
                pool = await client.create_work_pool(
                    WorkPoolCreate(name=self.work_pool, type=DstackWorker.type, base_job_template=template)
                )
            check_pool(pool, self.work_pool)
            flow_run = await create_flow_run(client, self, parameters, variables)
            try:
                values = _bundles.values_to_pickle(parameters)
                parcel = _bundles.make(self.plain, flow_run, values, carries=self.carries_result)
                await _bundles.store(client, flow_run.id, parcel)
            except Exception as error:
                state: State[Any] = Crashed(message=f"The flow could not be handed to a worker: {error}")
                await client.set_flow_run_state(flow_run.id, state, force=True)
                raise
            await client.set_flow_run_state(flow_run.id, Scheduled())
        return DstackFlowRunFuture(flow_run.id, carries_result=self.carries_result)

    def with_options(self, **options: Any) -> DstackFlow[P, R]:
        """Return a copy with other options: those of a flow, and ``work_pool`` and ``job_variables``."""
        work_pool = options.pop("work_pool", None) or self.work_pool
        variables = options.pop("job_variables", None)
        job_variables = self.job_variables if variables is None else dict(variables)
        plain = self.plain.with_options(**options)
        return DstackFlow.bind(plain, work_pool, job_variables, self.credentials, self.callbacks)

    def _given(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the parameters as the flow gets them. Raises what a call of it raises for wrong ones."""
        _check_api()
        parameters = get_call_parameters(self.fn, args, kwargs)
        resolved: dict[str, Any] = resolve_futures_to_results(parameters)
        return self.validate_parameters(resolved) if self.should_validate_parameters else resolved

    def _future(self, call: RemoteCall) -> DstackFlowRunFuture[R]:
        if call.flow_run is None:
            raise RuntimeError(f"the call of flow {self.name} ended without a flow run")
        return DstackFlowRunFuture(call.flow_run.id, carries_result=self.carries_result)


def _variables(
    credentials: CredentialsLike, commands: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the job variables. Raises ``ConfigurationError`` and ``TypeError``."""
    from pydantic import ValidationError

    from dstack_core import check_options

    check_options(options, MachineOptions.__optional_keys__)
    if isinstance(commands, str) or not all(isinstance(command, str) for command in commands):
        _refuse(f'commands: expected a list such as ["pip install torch"], got {commands!r}.')
    variables = dict(options)
    if isinstance(credentials, str):
        variables["credentials"] = credentials
    elif credentials is not None and not isinstance(credentials, DstackCredentials):
        _refuse(
            "credentials: expected a DstackCredentials block, the name of a saved one, or None, got "
            f"{type(credentials).__name__}."
        )
    configuration = dict(options.get("configuration") or {})
    if before := [*(configuration.get("commands") or []), *commands]:
        variables["configuration"] = {**configuration, "commands": before}
    _check_tags_and_debug(options)
    try:
        DstackVariables(**variables)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        _refuse(f"{name}: {first['msg']}, got {first['input']!r}.")
    return variables


def _check_tags_and_debug(options: Mapping[str, Any]) -> None:
    """Raise ``ConfigurationError``; what Prefect fills in later is not checked."""
    from dstack_core.integration import check_tags, hold_seconds, read_survive

    tags, debug = options.get("tags"), options.get("debug_on_failure")
    if tags is not None and not isinstance(tags, bool) and not _is_template(tags):
        own = tags.items() if isinstance(tags, Mapping) else ()
        check_tags("tags", {key: value for key, value in own if not _is_template(value)} if own else tags)
    if not _is_template(debug):
        hold_seconds(debug)
    if not _is_template(options.get("survive")):
        read_survive(options.get("survive"))


def _is_template(value: object) -> bool:
    return isinstance(value, str) and "{{" in value


def _check_api() -> None:
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        _refuse(
            "PREFECT_API_URL: expected the address of a Prefect server, which the machine must reach, got "
            "none. Run `prefect server start`, and `prefect config set PREFECT_API_URL=<its address>/api`."
        )


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
