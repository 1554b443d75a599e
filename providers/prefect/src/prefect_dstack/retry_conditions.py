"""The retry condition of a Prefect task: try again where the cause of the failure may pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

__all__ = ["retry_on"]


def is_below_cost_limit(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether a task whose run failed may be tried again: not a run that was stopped at ``max_cost``.

    It is the condition of the tasks of this package that have none of their own.
    """
    return _category(state) != "limit.max_cost"


def _category(state: State[Any]) -> str | None:
    from dstack_core.integration import category_of

    # Prefect wraps the exception of a task whose results it keeps.
    error = getattr(state.data, "result", state.data)
    return category_of(error) if isinstance(error, BaseException) else None


def retry_on(*categories: str | Collection[str]) -> Callable[[Task[..., Any], TaskRun, State[Any]], bool]:
    """Return a condition for ``retry_condition_fn`` of a task, by the failure category of its run.

    A task is tried again only if its run ended with one of the categories, or if the dstack server did not
    answer and ``server`` is one of them. Any other error fails the task at once, despite ``retries``. A
    condition adds no tries: set ``retries`` too. Source: Prefect documentation, "Retry behavior of tasks".

    Args:
        *categories: Failure categories such as ``"image.pull_failed"``, and groups such as ``"capacity"``,
            which stand for all that begin with them; or lists of these. Default: ``capacity``, ``spot``,
            ``machine``, ``image.pull_failed``, ``server`` and ``gateway``.

    Raises:
        ConfigurationError: A name is neither a failure category nor a group.

    Example:
        ``run_task.with_options(retries=3, retry_condition_fn=retry_on("capacity", "spot"))(configuration)``
    """
    from dstack_core.integration import RETRIED_CATEGORIES, check_categories, in_categories

    names: list[str] = []
    for each in categories:
        names += each if isinstance(each, list | tuple | set | frozenset) else [each]  # type: ignore[list-item]
    wanted = check_categories(names or RETRIED_CATEGORIES, "retry_on")

    def is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        category = _category(state)
        return category is not None and in_categories(category, wanted)

    return is_worth_a_retry
