"""Run the body of a Python function on a GPU: ``@task.dstack``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk.bases.decorator import TaskDecorator


def dstack_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a function a task whose body runs in a dstack run, and whose return value becomes its XCom.

    Airflow offers it as ``@task.dstack``. ``image`` (str) or ``python`` (str, such as ``"3.11"``),
    ``resources`` (``Resources``, a dict or a text as in YAML), ``env`` (dict), ``registry_auth``,
    ``commands`` (list of str: what to run before the function, such as ``pip install``); ``configuration``
    (as for ``DstackRunOperator``, a task) is where these are added to. All parameters of
    ``DstackRunOperator`` work too, ``deferrable`` and templates included. With ``serializer="json"`` the
    function travels as its source, so it imports inside its body all it needs, and arguments and result are
    plain values (tuples become lists). With ``"cloudpickle"`` it is pickled with what it refers to; the run
    needs the package ``cloudpickle`` and the worker's Python version. ``max_result_bytes`` (int, default
    1 MiB) limits the result, which travels in the run's log. Function and arguments travel in an uploaded
    archive: they are neither in the run's configuration nor in a process list.

    A function that raises fails the task as ``DstackRunFailed`` with the end of its traceback; one that can
    never work as it is (a result that JSON cannot carry, no Python in the image) as
    ``AirflowFailException``. Source: Airflow documentation, "TaskFlow" and "Creating Custom @task
    Decorators".
    """
    from airflow.sdk.bases.decorator import task_decorator_factory

    from airflow_provider_dstack._decorated import DstackDecoratedOperator

    if "resources" in kwargs:
        # Airflow reads an argument of that name as its own when the task is mapped.
        if "run_resources" in kwargs:
            raise ValueError("resources and run_resources are the same thing; give one of them")
        kwargs["run_resources"] = kwargs.pop("resources")
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=DstackDecoratedOperator,
        **kwargs,
    )
