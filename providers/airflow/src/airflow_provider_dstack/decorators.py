"""Run the body of a Python function on a GPU: ``@task.dstack``."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._parameters import one_of, refuse_result
from airflow_provider_dstack.errors import DstackError, DstackRunFailed
from airflow_provider_dstack.operators import DstackRunOperator

if TYPE_CHECKING:
    from airflow.sdk.bases.decorator import TaskDecorator

    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._function import Serializer
    from dstack_core import Configuration, RegistryAuth, Resources, Run

# The result travels in the log, base64 and in lines of 3000 bytes; a larger one holds up its relay.
_MAX_RESULT_BYTES = 1024 * 1024


def dstack_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a function a task whose body runs in a dstack run, and whose return value becomes its XCom.

    Airflow offers it as ``@task.dstack``. Function and arguments travel in an uploaded archive: they are
    neither in the run's configuration nor in a process list.

    Args:
        python_callable: The function. With ``serializer="json"`` it must import what it needs inside its
            body.
        multiple_outputs: Push each entry of a returned dict as an XCom of its own. Default: Airflow's.
        **kwargs: The parameters below, and all of ``DstackRunOperator``, ``deferrable`` and templates
            included.
        image: The image to run in (str). It needs Python 3.7 or newer. Default: dstack's own.
        python: The Python version of dstack's own image (str, such as ``"3.11"``). Default: dstack's.
        resources: ``Resources``, a dict or a text as in YAML. Default: those of ``configuration``.
        commands: What to run before the function (list of str), such as ``pip install``. Default: nothing.
        registry_auth: ``RegistryAuth`` or a dict, for a private ``image``. Default: none.
        configuration: A task as for ``DstackRunOperator``, to which these are added. Default: an empty one.
        serializer: With ``"json"`` (default) the function travels as its source, and arguments and result
            are plain values (tuples become lists). With ``"cloudpickle"`` it is pickled with what it refers
            to; the run needs the package ``cloudpickle`` and the worker's Python version.
        max_result_bytes: The limit for the result, which travels in the run's log. Default 1 MiB.

    Returns:
        What ``@task.dstack`` makes of a function; a call of it returns the task's ``XComArg``.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        DstackRunFailed: In the task: the function raised. The message has the end of its traceback.
        AirflowFailException: In the task: no retry can help, for example because JSON cannot carry the
            result, or the image has no Python.

    Example:
        ``@task.dstack(image="python:3.11", resources={"gpu": "24GB.."})`` above ``def train(): ...``

    Source: Airflow documentation, "TaskFlow" and "Creating Custom @task Decorators".
    """
    if "resources" in kwargs:
        # Airflow reads an argument of that name as its own when the task is mapped.
        if "run_resources" in kwargs:
            raise ValueError("resources: expected resources or run_resources, which are the same, got both.")
        kwargs["run_resources"] = kwargs.pop("resources")
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=DstackDecoratedOperator,
        **kwargs,
    )


class DstackDecoratedOperator(DecoratedOperator, DstackRunOperator):
    """The operator behind ``@task.dstack``; ``dstack_task`` explains the parameters."""

    template_fields: Sequence[str] = (
        "op_args",
        "op_kwargs",
        "image",
        "python",
        "commands",
        *DstackRunOperator.template_fields,
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        "op_args": "py",
        "op_kwargs": "py",
        **DstackRunOperator.template_fields_renderers,
    }
    custom_operator_name = "@task.dstack"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        configuration: Any = None,
        image: str | None = None,
        python: str | None = None,
        commands: Sequence[str] = (),
        registry_auth: RegistryAuth | Mapping[str, str] | None = None,
        resources: Resources | Mapping[str, Any] | str | int | None = None,
        run_resources: Resources | Mapping[str, Any] | str | int | None = None,
        serializer: Serializer = "json",
        max_result_bytes: int = _MAX_RESULT_BYTES,
        **kwargs: Any,
    ) -> None:
        if inspect.iscoroutinefunction(python_callable):
            raise ValueError(f"{python_callable.__name__}: expected a plain function, got an async one.")
        refuse_result(kwargs, "The task returns what the function returned.")
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            configuration={"type": "task"} if configuration is None else configuration,
            run_resources=run_resources if resources is None else resources,
            **kwargs,
        )
        self.image = image
        self.python = python
        self.commands = commands
        self.registry_auth = registry_auth
        self.serializer = one_of("serializer", serializer, ("json", "cloudpickle"))
        if max_result_bytes < 1:
            raise ValueError(f"max_result_bytes: expected 1 byte or more, got {max_result_bytes!r}.")
        self.max_result_bytes = max_result_bytes
        self._code: TemporaryDirectory[str] | None = None

    def execute(self, context: Context) -> Any:
        """Run the function and return what it returned."""
        execute = super().execute
        self._write_files(context)
        try:
            return self._result_of(lambda: execute(context))
        finally:
            self._remove_files()

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> Any:
        """Return what the function returned, once the trigger reported its end."""
        complete = super().execute_complete
        return self._result_of(lambda: complete(context, event))

    def secret_texts(self) -> Iterator[str]:
        """Yield the texts that logs and rendered fields must not show."""
        from airflow_provider_dstack._parameters import secrets_in

        yield from super().secret_texts()
        yield from secrets_in({"type": "task", "registry_auth": self.registry_auth})

    def _arguments(self, context: Context) -> dict[str, Any]:
        """Return the keyword arguments, with those of Airflow's context that the function names."""
        names = list(inspect.signature(self.python_callable).parameters)[len(self.op_args) :]
        known: Mapping[str, Any] = context
        return {**{name: known[name] for name in names if name in known}, **self.op_kwargs}

    def announce(self, context: Context, run: Run) -> None:
        """Remove the function's files, which the server has, and push the run's address."""
        self._remove_files()
        super().announce(context, run)

    def _write_files(self, context: Context) -> None:
        """Make the function and its arguments part of what is submitted."""
        from airflow_provider_dstack._from_operator import directory_of, names_of
        from airflow_provider_dstack._function import call_of, launcher, write_files

        call = call_of(self.python_callable, self.op_args, self._arguments(context), self.serializer)
        marker = names_of(self, context).run.marker
        self.configuration = self._with_function(launcher(marker, self.image))
        self._code = TemporaryDirectory(prefix="dstack-task-")
        path, users = Path(self._code.name), directory_of(self, context)
        if users is not None:
            shutil.copytree(users, path, symlinks=True, dirs_exist_ok=True)
        write_files(path, call, marker, self.max_result_bytes)
        self.repo_dir = path

    def _remove_files(self) -> None:
        if self._code is not None:
            self._code.cleanup()

    def _with_function(self, command: str) -> Configuration:
        """Return the configuration with what the decorator's own parameters add to it."""
        from airflow_provider_dstack._parameters import read_configuration

        base = read_configuration(self.configuration)
        if base.type != "task":
            raise AirflowFailException(f"configuration: expected a task, got a {base.type}.")
        given = {
            "image": self.image,
            "python": self.python,
            "registry_auth": self.registry_auth,
            "commands": [*(base.commands or []), *self.commands, command],
        }
        fields = {name: getattr(base, name) for name in base.model_fields_set}
        fields.update({name: value for name, value in given.items() if value})
        return type(base).model_validate(fields)

    def _result_of(self, run: Callable[[], Mapping[str, Any]]) -> Any:
        from airflow_provider_dstack._function import value_of
        from dstack_core.integration import mask

        name = self.python_callable.__name__
        try:
            outcome = run()
        except DstackRunFailed as error:
            frame = self._frame(error.outcome, wait=False) or {}
            if frame.get("kind") == "unusable":
                raise AirflowFailException(f"{name}: {frame['message']}") from None
            if frame.get("kind") == "raised":
                lines = mask("".join(f"\n  {line}" for line in frame["traceback"]), self.secret_texts())
                text = f"{name} raised an exception in run {error.outcome['run_name']}:{lines}"
                raise DstackRunFailed(text, error.outcome) from None
            raise
        found = self._frame(outcome, wait=True)
        if found is None or found.get("kind") != "result":
            raise DstackError(
                f"{name}: run {outcome['run_name']} succeeded, but its log holds no result. "
                f"See {outcome['url']}"
            )
        return value_of(found, self.serializer)

    def _frame(self, outcome: Mapping[str, Any], *, wait: bool) -> dict[str, Any] | None:
        from airflow_provider_dstack._function import read_back
        from airflow_provider_dstack._outcome import as_airflow_error
        from dstack_core import DstackError as CoreError

        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                return read_back(client, outcome["run_name"], outcome["run_id"], wait=wait)
        except CoreError as error:
            if wait:
                raise as_airflow_error(error, submitted=True) from error
            self.log.warning("Could not read the log of run %s: %s", outcome["run_name"], error)
            return None
