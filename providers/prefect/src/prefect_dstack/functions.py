"""``dstack_task``: a Python function as a Prefect task whose body is executed in a run.

Prefect makes the keys of its caches and task runs of the source and the code of a task's function. The
function that it gets here only makes the call, and is the same for all tasks. So its signature, name and
source are those of the user's function (``functools.wraps``), and its code has a constant drawn from that
source.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from hashlib import sha256
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from prefect import Task

from prefect_dstack._job import OnCrash, refuse
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._remote_function import RemoteFunction
from prefect_dstack.retry_conditions import is_below_cost_limit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal, Unpack

    from dstack_core import CallbacksLike, ConfigurationLike, RegistryAuth
    from prefect_dstack._function_options import FunctionTaskOptions, Module, Requirements
    from prefect_dstack.credentials import CredentialsLike

P = ParamSpec("P")
R = TypeVar("R")

# That of ``dstack_core``, which the module of a flow does not import; a test holds them equal.
_MAX_RESULT_BYTES = 1024 * 1024


@overload
def dstack_task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def dstack_task(
    function: None = None,
    /,
    *,
    credentials: CredentialsLike = None,
    image: str | None = None,
    python: str | None = None,
    commands: Sequence[str] | None = None,
    registry_auth: RegistryAuth | Mapping[str, Any] | None = None,
    nodes: int | None = None,
    configuration: ConfigurationLike | None = None,
    serializer: Literal["json", "cloudpickle"] = "json",
    modules: Iterable[Module] | Module = (),
    requirements: Requirements = (),
    cache_dir: str | None = None,
    torchrun: bool = False,
    max_result_bytes: int = _MAX_RESULT_BYTES,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[FunctionTaskOptions],
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def dstack_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    credentials: CredentialsLike = None,
    image: str | None = None,
    python: str | None = None,
    commands: Sequence[str] | None = None,
    registry_auth: RegistryAuth | Mapping[str, Any] | None = None,
    nodes: int | None = None,
    configuration: ConfigurationLike | None = None,
    serializer: Literal["json", "cloudpickle"] = "json",
    modules: Iterable[Module] | Module = (),
    requirements: Requirements = (),
    cache_dir: str | None = None,
    torchrun: bool = False,
    max_result_bytes: int = _MAX_RESULT_BYTES,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = True,
    callbacks: CallbacksLike = None,
    on_crash: OnCrash = "stop",
    **options: Unpack[FunctionTaskOptions],
) -> Any:
    """Make a function a Prefect task whose body is executed in a run, and whose value comes back.

    The task is one of Prefect: call it in a flow, ``submit`` or ``map`` it, change it with ``with_options``,
    let it retry or cache. An ``async def`` gives a task that is awaited. Function and arguments travel as
    files: they are neither in the run's configuration nor in its environment nor in a process list. Each try
    of a task run is one run, whose name begins with the function's; its log, its artifacts, its events and
    what stops it are those of ``run_task``.

    Args:
        function: The function, for ``@dstack_task`` without parentheses.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        image: The image to run in. It needs Python 3.8 or newer. Default: dstack's own.
        python: The Python version of dstack's own image, such as ``"3.12"``. Default: dstack's; for a pickled
            call this Python's.
        commands: What to run before the function. Default: nothing.
        registry_auth: ``RegistryAuth`` or a dict, for a private ``image``; values may be ``Secret`` blocks or
            ``SecretStr``. Default: none.
        nodes: How many nodes call the function; the first returns. Default: 1.
        configuration: A task as for ``run_task``, to which the call is added. Default: an empty one.
        serializer: With ``"json"`` the function travels as its source, so it imports what it needs inside its
            body, and arguments and result are plain values (tuples become lists). With ``"cloudpickle"`` it
            is pickled with what it refers to; the run needs the package ``cloudpickle`` and this Python's
            minor version, and the result is unpickled here, so the run must be one that you trust.
            ``DSTACK_FORBID_CLOUDPICKLE=1`` in the environment forbids it. Default: ``"json"``.
        modules: What the function imports of the own project: modules, packages, or paths of files and
            folders; at most 2 MiB. They are read when the task runs. Default: none.
        requirements: What the run installs before it calls the function: a list as for pip, or the path of a
            requirements file; a wheel of this machine travels. Default: nothing.
        cache_dir: The folder in the run that keeps what was installed, such as the path of a volume. Default:
            ``DSTACK_FUNCTION_CACHE`` in the run, else ``~/.cache/dstack-functions``.
        torchrun: Call the function once a GPU under torchrun; the process of rank 0 returns. Default: False.
        max_result_bytes: The limit for the result, which travels in the run's log. Default: 1 MiB.
        poll_interval: Seconds between two status requests. Default: 5.
        retry_budget: Seconds to keep retrying an unreachable server; the run keeps running meanwhile.
            Default: 600.
        stream_logs: Send what the function prints to the run logger. Default: True.
        log_budget_bytes: How many bytes of log to send, in whole lines; None sends all. Default: 10 MB.
        log_timestamps: Begin each line with the time at which the server logged it. Default: False.
        artifacts: Show the run in the flow run's artifacts. Default: True.
        callbacks: What is called while the run is followed, as for ``run_task``. Default: none.
        on_crash: ``"stop"`` or ``"keep"``, as for ``run_task``. Default: ``"stop"``.
        **options: The options of a submission, as for ``run_task``: ``resources``, ``env``, ``max_duration``
            and the others; and those of Prefect's ``@task``: ``name``, ``retries``, ``retry_delay_seconds``,
            ``tags``, ``cache_policy``, ``persist_result``, ``timeout_seconds`` and the others.

    Returns:
        The task. A call of it returns what the function returned, None for a function that ended with
        ``dstack_report.skip``. Secrets of the run in the value are replaced by ``***``, with a warning.

    Raises:
        ConfigurationError: A value is wrong, or with ``"json"`` the source of the function is not all that it
            needs: raised where the function is decorated. In the task: what depends on the arguments or on
            files; nothing was submitted.
        RemoteFunctionError: In the task: the function raised.
        UnusableFunctionError: In the task: the call cannot work as it is, for example because JSON cannot
            carry the result, or the image has no Python.
        RunFailedError, NoCapacityError, RunStoppedError: In the task: the run's end; after ``sys.exit(3)`` a
            ``RunFailedError`` with this exit status.
        NoResultError: In the task: the run succeeded, but its log holds no result.
        ServerError: In the task: ``ServerUnreachableError`` and the other server errors, which leave the run
            alone.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import dstack_task


        @dstack_task(resources={"gpu": "24GB.."}, requirements=["torch==2.9"], retries=2)
        def train(rate: float) -> float:
            import torch

            return rate * torch.cuda.device_count()


        @flow
        def sweep() -> list[float]:
            return train.map([0.1, 0.01]).result()
        ```

    Source: Prefect's documentation, "Tasks" and "Caching".
    """
    following = {
        "poll_interval": poll_interval,
        "retry_budget": retry_budget,
        "stream_logs": stream_logs,
        "log_budget_bytes": log_budget_bytes,
        "log_timestamps": log_timestamps,
        "artifacts": artifacts,
        "callbacks": callbacks,
        "on_crash": on_crash,
    }
    packing = {
        "serializer": serializer,
        "modules": modules,
        "requirements": requirements,
        "cache_dir": cache_dir,
        "torchrun": torchrun,
        "max_result_bytes": max_result_bytes,
    }
    machine = {
        "image": image,
        "python": python,
        "commands": commands,
        "registry_auth": registry_auth,
        "nodes": nodes,
    }
    given: dict[str, Any] = dict(options)

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        of_task, of_submission = _split(given)
        remote = RemoteFunction(
            function, credentials, configuration, packing, machine, following, of_submission
        )
        remote.check()
        return Task(_caller(remote), **{"retry_condition_fn": is_below_cost_limit, **of_task})

    return decorate if function is None else decorate(function)


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of Prefect's task, and those of a submission. Raises ``ConfigurationError``."""
    from prefect_dstack._function_options import OPTION_NAMES, TASK_NAMES

    known = [*_own_names(), *OPTION_NAMES]
    for name in options:
        if name not in OPTION_NAMES:
            from difflib import get_close_matches

            close = get_close_matches(name, known, 1)
            refuse(
                f"{name}: expected an option of dstack_task, of run_task or of Prefect's task, got {name}. "
                + (f"Did you mean {close[0]}?" if close else "Check the spelling.")
            )
    tags = options.get("tags")
    # The one name that both have: dstack's tags have values.
    is_dstacks = {"tags"} if isinstance(tags, Mapping) or tags is False else set()
    of_task = {name: value for name, value in options.items() if name in TASK_NAMES - is_dstacks}
    return of_task, {name: value for name, value in options.items() if name not in of_task}


def _own_names() -> list[str]:
    parameters = inspect.signature(dstack_task).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def _caller(remote: RemoteFunction) -> Callable[..., Any]:
    """Return what Prefect calls: a function with the name, signature, source and key of the user's."""
    caller: FunctionType
    if inspect.iscoroutinefunction(remote.function):

        async def acall(*args: Any, **kwargs: Any) -> Any:
            return await remote.acall(args, kwargs)

        caller = acall  # type: ignore[assignment]
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return remote.call(args, kwargs)

        caller = call  # type: ignore[assignment]
    functools.update_wrapper(caller, remote.function)
    try:
        source = inspect.getsource(remote.function).encode()
    except (OSError, TypeError):
        source = remote.function.__code__.co_code
    code = caller.__code__
    caller.__code__ = code.replace(co_consts=(*code.co_consts, sha256(source).hexdigest()))
    return caller
