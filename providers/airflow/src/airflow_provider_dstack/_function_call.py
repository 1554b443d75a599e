"""What goes into the call of a ``@task.dstack`` function, and what comes back from its run.

``dstack_core`` packs the call and reads what the run reported of it. This adds what is Airflow's: its
context, paths beside the DAG's file, and its exceptions.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from airflow_provider_dstack._compat import AirflowSkipException
from airflow_provider_dstack.errors import (
    AirflowFailException,
    DstackError,
    DstackRunFailed,
    DstackRunInterrupted,
)

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core.integration import FunctionCall

Serializer: TypeAlias = Literal["json", "cloudpickle"]
PathLike: TypeAlias = "str | os.PathLike[str]"
ModuleLike: TypeAlias = "ModuleType | PathLike"

# How late a kill is seen, of the 5 s that Airflow leaves.
_TICK_SECONDS = 0.05


def arguments_of(
    function: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any], context: Context
) -> dict[str, Any]:
    """Return the keyword arguments, with those of Airflow's context that the function names.

    Raises ``AirflowFailException`` for what of the context cannot leave the worker.
    """
    names = list(inspect.signature(function).parameters)[len(args) :]
    known: Mapping[str, Any] = context
    found: dict[str, Any] = {}
    refused: list[str] = []
    for name in names:
        if name in kwargs or name not in known:
            continue
        try:
            found[name] = _plain(known[name])
        except TypeError:
            refused.append(name)
    if refused:
        raise AirflowFailException(
            f"{function.__name__}: expected parameters for keys of Airflow's context that JSON can carry, "
            f"got {', '.join(refused)}. Name others, such as ds or run_id, or pass what the function needs "
            'as an argument, such as "{{ logical_date }}".'
        )
    return {**found, **kwargs}


def paths_of(modules: Iterable[ModuleLike] | ModuleLike) -> list[ModuleLike]:
    """Return the modules as a list, with paths in place of imported ones, for when the DAG is parsed.

    Airflow copies and stores what an operator has, and cannot do either with a module.
    """
    single = isinstance(modules, str | os.PathLike | ModuleType)
    given: Any = [modules] if single else modules
    return [path for module in given for path in _paths(module)]


def _paths(module: ModuleLike) -> list[ModuleLike]:
    if not isinstance(module, ModuleType):
        return [module]
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    file = getattr(top, "__file__", None)
    # One without a file is refused by ``dstack_core`` in the task.
    return [*getattr(top, "__path__", ())] or ([file] if file and top.__name__ != "__main__" else [module])


def local_modules(
    modules: Iterable[ModuleLike] | ModuleLike, beside: Callable[[PathLike], Path | None]
) -> list[Any]:
    """Return the modules as a list; ``beside`` makes a relative path one beside the DAG's file."""
    found = paths_of(modules)
    return [beside(module) if isinstance(module, str | os.PathLike) else module for module in found]


def local_requirements(
    requirements: Sequence[str] | PathLike | None, beside: Callable[[PathLike], Path | None]
) -> Any:
    """Return the requirements; relative paths of a requirements file, and of wheels, by ``beside``."""
    if not requirements:
        return ()
    if isinstance(requirements, str | os.PathLike):
        return beside(requirements)
    return [
        str(beside(line)) if str(line).endswith(".whl") and "://" not in str(line) else line
        for line in requirements
    ]


def read_result(
    call: FunctionCall,
    key: str,
    outcome: Mapping[str, Any],
    failure: DstackRunFailed | None,
    *,
    hook: DstackHook,
    secrets: Iterable[str],
    poll_interval: float,
    retry_budget: float,
    log: Any,
    is_killed: Callable[[], bool],
) -> Any:
    """Read in the log of a run that has ended what its function returned.

    A log store may show the last lines some seconds after the end; they are waited for.

    Args:
        call: The call, to read with.
        key: The key of what the run reports of the function.
        outcome: How the run ended.
        failure: The task's error if the run failed, else None. Raised if the function reported nothing.
        hook: Makes the client.
        secrets: What is masked in messages.
        poll_interval: Seconds between two status requests.
        retry_budget: Seconds to keep retrying an unreachable server.
        log: The task's log.
        is_killed: Returns whether the task was ended meanwhile.

    Returns:
        The value.

    Raises:
        DstackRunFailed: The function raised; the message has the end of its traceback.
        AirflowFailException: The call can never work.
        AirflowSkipException: The function called ``dstack_report.skip``.
        DstackError: The log holds no result, or could not be read.
    """
    from airflow_provider_dstack._outcome import as_airflow_error
    from dstack_core import DstackError as CoreError
    from dstack_core import (
        FunctionRun,
        FunctionSkipped,
        RemoteFunctionError,
        RunError,
        RunNotFoundError,
        UnusableFunctionError,
        clock,
    )
    from dstack_core.integration import mask

    def pause(seconds: float) -> None:
        def check() -> None:
            if is_killed():
                raise DstackRunInterrupted(f"The task was ended before the result of run {name} was read.")

        check()
        clock.sleep_in_slices(seconds, _TICK_SECONDS, check)

    name, hidden = outcome["run_name"], list(secrets)
    try:
        with hook.client(retry_budget=retry_budget) as client:
            run = client.runs.get(name, sleep=pause)
            if run is None or run.id != outcome["run_id"]:
                raise RunNotFoundError(f"Run {name} was deleted before its result was read.")
            function_run = FunctionRun(call, key, run)
            return function_run.result(poll_interval=poll_interval, retry_budget=retry_budget, sleep=pause)
    except RemoteFunctionError as error:
        raise DstackRunFailed(mask(error.message, hidden), outcome) from None
    except UnusableFunctionError as error:
        raise AirflowFailException(mask(error.message, hidden)) from None
    except FunctionSkipped as error:
        text = f"Run {name} asks to skip the task: {mask(error.reason, hidden)}"
        # Airflow logs the reason within a group that its UI shows closed.
        log.info("%s", text)
        raise AirflowSkipException(text) from None
    except RunError as error:
        # The function reported nothing that explains more than the run's end does.
        raise failure or DstackError(error.message) from None
    except CoreError as error:
        if failure is None:
            raise as_airflow_error(error, submitted=True) from error
        log.warning("Could not read the log of run %s: %s", name, error)
        raise failure from None


def _plain(value: Any) -> Any:
    """Return a value of Airflow's context as JSON has it. Raises ``TypeError`` for what JSON would lose."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    raise TypeError(f"context: expected a value that JSON can carry, got {type(value).__name__}.")
