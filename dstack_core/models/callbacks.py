"""User code that is called while a run is followed: its methods, their one argument, and how it is given.

A DAG file imports this module when it is parsed, so it imports next to nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core.models.outcome import Outcome


@dataclass(frozen=True, slots=True)
class CallbackEvent:
    """What happened to a run: the argument of each method of ``RunCallbacks``.

    Attributes:
        kind: ``submitted``, ``provisioning``, ``running``, ``log_lines``, ``metric`` or ``ended``.
        run_name: The run's name.
        run_id: The run's id (a UUID).
        project: The run's project.
        url: The address of the run's page.
        status: The run's status at that moment (str).
        message: The server's detail on the status, or None.
        is_taken_over: Of ``submitted``: whether an earlier try or execution submitted the run.
        lines: Of ``log_lines``: the lines, secrets masked (tuple of str).
        node: Of ``log_lines`` and ``metric``: the node, counted from 0.
        replica: Of ``log_lines`` and ``metric``: the replica, counted from 0.
        metrics: Of ``metric``: the values by name.
        step: Of ``metric``: the step that the run gave, or None.
        outcome: Of ``ended``: how the run ended, else None.
        source: What follows the run, texts by name: ``dag_id``, ``task_id``, ``run_id``, ``try_number`` and
            ``map_index`` in Airflow, ``flow_run_id`` and ``task_run_id`` in Prefect.
    """

    kind: str
    run_name: str
    run_id: str
    project: str
    url: str
    status: str
    message: str | None = None
    is_taken_over: bool = False
    lines: tuple[str, ...] = field(default=(), repr=False)
    node: int = 0
    replica: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    step: int | float | None = None
    outcome: Outcome | None = None
    source: Mapping[str, str] = field(default_factory=dict)


class RunCallbacks:
    """The base of user code that is called while a run is followed; override what you need.

    An instance is made without arguments for each run, in each process that follows it. Its methods are
    called one after another, in a thread of their own, so a slow one delays neither the log nor the task.
    What one raises is logged once as a warning and does not affect the task.

    Example:
        ```python
        from dstack_core import CallbackEvent, RunCallbacks


        class Announce(RunCallbacks):
            def on_running(self, event: CallbackEvent) -> None:
                print(f"{event.run_name} is running: {event.url}")
        ```
    """

    def on_submitted(self, event: CallbackEvent) -> None:
        """Act on a run that the server has accepted, or that was taken over (``is_taken_over``)."""

    def on_provisioning(self, event: CallbackEvent) -> None:
        """Act on a run that gets a machine; again if dstack retries the run."""

    def on_running(self, event: CallbackEvent) -> None:
        """Act on a run whose commands have started; again if dstack retries the run."""

    def on_log_lines(self, event: CallbackEvent) -> None:
        """Act on a batch of log lines: those that one request returned."""

    def on_metric(self, event: CallbackEvent) -> None:
        """Act on metrics that the run reported with ``dstack_report.metric``."""

    def on_ended(self, event: CallbackEvent) -> None:
        """Act on the end of the run, which ``event.outcome`` describes."""


# What is called, in the order of a run's life.
CALLBACK_EVENTS = tuple(name.removeprefix("on_") for name in vars(RunCallbacks) if name.startswith("on_"))

OneCallback: TypeAlias = type[Any] | RunCallbacks | str
CallbacksLike: TypeAlias = OneCallback | Sequence[OneCallback] | None
"""A class with the methods of ``RunCallbacks``, its path (``"package.module.Class"``), an instance, or a list
of those."""


def check_callbacks(given: CallbacksLike, *, by_path: bool = False) -> list[OneCallback]:
    """Return the callbacks as a list, checked; makes no instance and imports nothing.

    Args:
        given: What the user gave.
        by_path: Whether another process has to import them, so that each needs a path that can be imported.

    Returns:
        Classes, paths and instances; with ``by_path`` paths alone.

    Raises:
        ConfigurationError: One of them cannot be called, or cannot be imported by another process.
    """
    if given is None:
        return []
    several = list(given) if isinstance(given, list | tuple) else [given]
    return [_checked(one, by_path) for one in several]


def _checked(one: Any, by_path: bool) -> OneCallback:
    if isinstance(one, str):
        module, _, name = one.replace(":", ".").rpartition(".")
        if not module or not all(part.isidentifier() for part in [*module.split("."), name]):
            raise ConfigurationError(
                f'callbacks: expected the path of a class such as "my_package.alerts.Alerts", got {one!r}.'
            )
        return one
    methods = [f"on_{kind}" for kind in CALLBACK_EVENTS]
    found = [name for name in methods if callable(getattr(one, name, None))]
    if not found:
        raise ConfigurationError(
            f"callbacks: expected a class with methods such as on_running(event), got {one!r}. "
            "Derive it from RunCallbacks."
        )
    _refuse_unknown(one, methods)
    for name in found:
        if inspect.iscoroutinefunction(getattr(one, name)):
            raise ConfigurationError(
                f"callbacks: expected plain methods, got async def {name} of {name_of(one)}. "
                "Call asyncio.run inside a plain method."
            )
    if not by_path:
        # Checked by its methods.
        return cast("OneCallback", one)
    return _path_of(one)


def _refuse_unknown(one: Any, methods: Sequence[str]) -> None:
    """Raise for an ``on_`` method that is never called, such as a misspelled one."""
    cls = one if isinstance(one, type) else type(one)
    if not issubclass(cls, RunCallbacks):
        # Its other methods may be for something else.
        return
    unknown = next((name for name in dir(cls) if name.startswith("on_") and name not in methods), None)
    if unknown is not None:
        from difflib import get_close_matches

        close = get_close_matches(unknown, methods, n=1)
        advice = f"Did you mean {close[0]!r}?" if close else "Give a method of your own another name."
        raise ConfigurationError(
            f"callbacks: expected methods of {', '.join(methods)}, got {unknown} of {name_of(one)}. {advice}"
        )


def _path_of(one: Any) -> str:
    advice = "Move it to a module of an installed package or a plugin."
    if not isinstance(one, type):
        raise ConfigurationError(
            "callbacks: expected a class that another process can import, got an instance of "
            f"{name_of(one)}. A triggerer or worker makes its own; pass the class."
        )
    if not one.__qualname__.isidentifier():
        raise ConfigurationError(
            "callbacks: expected a class that another process can import, got "
            f"{one.__qualname__}, which is defined inside a function or a class. {advice}"
        )
    # Not ``find_spec``, which finds what only this process has loaded, such as the file of a DAG.
    top = one.__module__.partition(".")[0]
    if top == "__main__" or PathFinder.find_spec(top) is None:
        raise ConfigurationError(
            f"callbacks: expected a class that another process can import, got {one.__qualname__} of "
            f"{one.__module__}, which is not on the import path. {advice}"
        )
    return f"{one.__module__}.{one.__qualname__}"


def load_callbacks(given: CallbacksLike) -> list[Any]:
    """Return instances of the callbacks, imported where they are paths.

    Raises:
        ConfigurationError: One of them cannot be imported or made.
    """
    return [_instance(one) for one in check_callbacks(given)]


def _instance(one: OneCallback) -> Any:
    what: Any = one
    if isinstance(one, str):
        module, _, name = one.replace(":", ".").rpartition(".")
        try:
            what = getattr(import_module(module), name)
        except Exception as error:
            raise ConfigurationError(
                f"callbacks: could not import {one!r}: {type(error).__name__}: {error}. "
                "Install its module where the run is followed."
            ) from None
        _checked(what, by_path=False)
    if not isinstance(what, type):
        return what
    try:
        return what()
    except Exception as error:
        raise ConfigurationError(
            f"callbacks: could not make {name_of(what)} without arguments: {type(error).__name__}: {error}."
        ) from None


def name_of(one: Any) -> str:
    """Return the name of a callback's class."""
    return one.__qualname__ if isinstance(one, type) else type(one).__qualname__
