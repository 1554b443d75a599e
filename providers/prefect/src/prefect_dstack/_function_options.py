"""The options of ``dstack_task`` beside its own parameters: those of every submission, and Prefect's.

A module of its own because its base class is the core's: importing the package loads nothing of
``dstack_core``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, Literal, TypeAlias

from prefect.tasks import TaskOptions

from prefect_dstack._options import OPTION_NAMES as SUBMIT_NAMES
from prefect_dstack._options import SubmitOptions

Module: TypeAlias = ModuleType | str | os.PathLike[str]
"""An imported module or package, or the path of a file or folder."""
Requirements: TypeAlias = Sequence[str] | str | os.PathLike[str]
"""A list of requirements as pip has them, or the path of a requirements file."""


class FunctionTaskOptions(SubmitOptions, total=False):
    """The options of a submission, and those of Prefect's ``@task``, which means the same by them.

    Prefect's own ``TaskOptions`` is a ``TypedDict`` of another library and cannot be a base class here.
    """

    name: str | None
    """The task's name. Default: the function's."""
    description: str | None
    """The task's description. Default: the function's docstring."""
    # Prefect and dstack have an option of this name.
    tags: Mapping[str, str] | Iterable[str] | Literal[False] | None  # type: ignore[misc]
    """A dict: tags of the run's machine at its cloud, as of ``run_task``; False for none. A list: Prefect's
    tags of the task runs, which may have concurrency limits.
    """
    version: str | None
    """The version of the task."""
    cache_policy: Any
    """What the key of a cached result is made of. Default: Prefect's, from inputs, source and flow run."""
    cache_key_fn: Callable[[Any, dict[str, Any]], str | None] | None
    """A function that makes this key."""
    cache_expiration: timedelta | None
    """How long a cached result is used. Default: without end."""
    refresh_cache: bool | None
    """Whether to make the call in spite of a cached result. Default: False."""
    task_run_name: Any
    """The name of a task run: a template of the function's arguments, or a function."""
    retries: int | None
    """How often a failed task run is tried again, each time with a new run. Default: Prefect's setting."""
    retry_delay_seconds: Any
    """The pause before a retry: seconds, a list of them, or a function. Default: Prefect's setting."""
    retry_jitter_factor: float | None
    """How much this pause varies."""
    retry_condition_fn: Callable[..., Any] | None
    """A function that decides whether to retry."""
    persist_result: bool | None
    """Whether Prefect stores the value, which caching across flow runs needs. Default: Prefect's setting."""
    result_storage: Any
    """Where Prefect stores the value."""
    result_serializer: Any
    """How Prefect stores the value."""
    result_storage_key: str | None
    """The key under which Prefect stores the value."""
    cache_result_in_memory: bool
    """Whether Prefect keeps the value in memory. Default: True."""
    timeout_seconds: float | None
    """The limit of one try; the run is stopped then. Default: none."""
    log_prints: bool | None
    """Without effect: what the function prints is in the task run's log."""
    on_completion: list[Callable[..., Any]] | None
    """What to call when a task run is completed."""
    on_failure: list[Callable[..., Any]] | None
    """What to call when a task run has failed."""
    on_running: list[Callable[..., Any]] | None
    """What to call when a task run begins."""
    on_rollback: list[Callable[..., Any]] | None
    """What to call when a transaction is rolled back."""
    on_commit: list[Callable[..., Any]] | None
    """What to call when a transaction is committed."""
    viz_return_value: Any
    """What ``flow.visualize()`` takes as the value."""
    asset_deps: list[Any] | None
    """The assets that the task depends on."""


# An option that a newer Prefect has is passed on, too.
TASK_NAMES = TaskOptions.__optional_keys__
OPTION_NAMES = SUBMIT_NAMES | TASK_NAMES
