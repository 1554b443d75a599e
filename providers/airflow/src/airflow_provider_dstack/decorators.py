"""Run the body of a Python function on a GPU: ``@task.dstack``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._parameters import one_of, refuse_result
from airflow_provider_dstack.errors import DstackRunFailed
from airflow_provider_dstack.operators import DstackRunOperator

if TYPE_CHECKING:
    from airflow.sdk.bases.decorator import TaskDecorator

    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._function_call import ModuleLike, PathLike, Serializer
    from dstack_core import RegistryAuth, Resources, Run
    from dstack_core.integration import FunctionCall

# Of ``dstack_core``, which a DAG file does not import; a test holds them equal.
DEFAULT_MAX_RESULT_BYTES = 1024 * 1024


def dstack_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a function a task whose body runs in a dstack run, and whose return value becomes its XCom.

    Airflow offers it as ``@task.dstack``. Function and arguments travel as files of the run, which need a
    server from 0.19.17 on: they are neither in the run's configuration nor in a process list. Parameters of
    the function with the name of a key of Airflow's context, such as ``ds``, get its value if JSON can carry
    it.

    Args:
        python_callable: The function, plain or async. With ``serializer="json"`` it must import what it
            needs inside its body. It can import ``dstack_report``, whose ``skip`` skips the task.
        multiple_outputs: Push each entry of a returned dict as an XCom of its own. Default: Airflow's.
        **kwargs: The parameters below, and all of ``DstackRunOperator``, ``deferrable`` and templates
            included.
        image: The image to run in (str). It needs Python 3.8 or newer. Default: dstack's own.
        python: The Python version of dstack's own image (str, such as ``"3.11"``). Default: dstack's; for a
            pickled function the worker's.
        resources: ``Resources``, a dict or a text as in YAML. Default: those of ``configuration``.
        commands: What to run before the function (list of str). Default: nothing.
        registry_auth: ``RegistryAuth`` or a dict, for a private ``image``. Default: none.
        configuration: A task as for ``DstackRunOperator``, to which these are added. Default: an empty one.
        serializer: With ``"json"`` (default) the function travels as its source, and arguments and result
            are plain values (tuples become lists). With ``"cloudpickle"`` it is pickled with what it refers
            to; the run needs the package ``cloudpickle`` and the worker's Python version.
        max_result_bytes: The limit for the result, which travels in the run's log. Default 1 MiB.
        requirements: What the run installs before it calls the function: a list as for pip, or the path of a
            requirements file. A wheel of the worker travels. Default: nothing.
        modules: What the function imports of the own project: modules, packages, or paths of files and
            folders; at most 2 MiB. Ignore files are honoured. Default: none.
        cache_dir: The folder in the run that keeps what was installed, such as the path of a volume. Default:
            ``DSTACK_FUNCTION_CACHE`` in the run, else ``~/.cache/dstack-functions``.
        torchrun: Call the function once a GPU under torchrun; the process of rank 0 returns. Default False.
        allow_cloudpickle: If False, the worker pickles and unpickles nothing, as with
            ``DSTACK_FORBID_CLOUDPICKLE=1`` in its environment. Default True.

    Relative paths of ``requirements`` and ``modules`` are in the DAG's folder.

    Returns:
        What ``@task.dstack`` makes of a function; a call of it returns the task's ``XComArg``.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        DstackRunFailed: In the task: the function raised. The message has the end of its traceback.
        AirflowFailException: In the task: no retry can help, for example because JSON cannot carry the
            result, or the image has no Python.
        AirflowSkipException: In the task: the function called ``dstack_report.skip``, or ended with an exit
            status of ``skip_on_exit_code``.

    Example:
        ``@task.dstack(image="python:3.11", resources={"gpu": "24GB.."})`` above ``def train(): ...``

    Source: Airflow documentation, "TaskFlow" and "Creating Custom @task Decorators".
    """
    if "resources" in kwargs:
        # Airflow reads an argument of that name as its own when the task is mapped.
        if "run_resources" in kwargs:
            raise ValueError("resources: expected resources or run_resources, which are the same, got both.")
        kwargs["run_resources"] = kwargs.pop("resources")
    if "modules" in kwargs:
        from airflow_provider_dstack._function_call import paths_of

        kwargs["modules"] = paths_of(kwargs["modules"])
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
        "requirements",
        "cache_dir",
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
        max_result_bytes: int = DEFAULT_MAX_RESULT_BYTES,
        requirements: Sequence[str] | PathLike = (),
        modules: Iterable[ModuleLike] | ModuleLike = (),
        cache_dir: str | None = None,
        torchrun: bool = False,
        allow_cloudpickle: bool = True,
        **kwargs: Any,
    ) -> None:
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
        self.requirements = requirements
        self.modules = modules
        self.cache_dir = cache_dir
        self.torchrun = torchrun
        self.allow_cloudpickle = allow_cloudpickle
        self._files: TemporaryDirectory[str] | None = None

    def execute(self, context: Context) -> Any:
        """Run the function and return what it returned."""
        execute = super().execute
        self._write_files(context)
        try:
            return self._result_of(context, lambda: execute(context))
        finally:
            self._remove_files()

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> Any:
        """Return what the function returned, once the trigger reported its end."""
        complete = super().execute_complete
        try:
            return self._result_of(context, lambda: complete(context, event))
        finally:
            self._remove_files()

    def before_submission(self, context: Context) -> None:
        """Write the function's files, which a resumed task no longer has."""
        self._write_files(context)

    def secret_texts(self) -> Iterator[str]:
        """Yield the texts that logs and rendered fields must not show."""
        from airflow_provider_dstack._parameters import secrets_in

        yield from super().secret_texts()
        yield from secrets_in({"type": "task", "registry_auth": self.registry_auth})

    def announce(self, context: Context, run: Run) -> None:
        """Remove the function's files, which the server has, and push the run's address."""
        if not self.fallbacks:
            self._remove_files()
        super().announce(context, run)

    def _write_files(self, context: Context) -> None:
        """Make the function and its arguments part of what is submitted."""
        from airflow_provider_dstack._parameters import in_words_of_operator, read_configuration
        from dstack_core import ConfigurationError

        self._files = TemporaryDirectory(prefix="dstack-task-")
        folder, key = Path(self._files.name) / "function", self._key(context)
        try:
            call = self._pack(context)
            call.write(folder, key)
            self.configuration = call.configuration(
                folder,
                key,
                read_configuration(self.configuration),
                # What a template made empty counts as left out.
                image=self.image or None,
                python=self.python or None,
                commands=self.commands or (),
                registry_auth=self.registry_auth or None,
            )
        except BaseException as error:
            self._remove_files()
            if isinstance(error, ConfigurationError):
                raise AirflowFailException(in_words_of_operator(error.message)) from None
            raise
        self._take_large_results(call)

    def _remove_files(self) -> None:
        if self._files is not None:
            self._files.cleanup()

    def _pack(self, context: Context) -> FunctionCall:
        from airflow_provider_dstack._from_operator import beside_dag
        from airflow_provider_dstack._function_call import arguments_of, local_modules, local_requirements
        from dstack_core.integration import FunctionCall

        beside = partial(beside_dag, context=context)
        return FunctionCall.pack(
            self.python_callable,
            self.op_args,
            arguments_of(self.python_callable, self.op_args, self.op_kwargs, context),
            serializer=self.serializer,
            modules=local_modules(self.modules, beside),
            requirements=local_requirements(self.requirements, beside),
            cache_dir=self.cache_dir or None,
            torchrun=self.torchrun,
            max_result_bytes=self.max_result_bytes,
            allow_cloudpickle=self.allow_cloudpickle,
        )

    def _key(self, context: Context) -> str:
        """Return the key of what the run reports of the function, the same for all tries.

        A try may take over the run of an earlier one, or submit it once more.
        """
        from airflow_provider_dstack._from_operator import names_of
        from dstack_core.integration import report_key

        names = names_of(self, context)
        return report_key(f"{names.task}#{names.born}")

    def _take_large_results(self, call: FunctionCall) -> None:
        """Let the message with the result pass the limit on messages, so that it is not reported as lost."""
        from airflow_provider_dstack._parameters import report_limits

        limits = report_limits(self.max_report_bytes, self.max_reports_per_second)
        self.max_report_bytes = max(limits.max_bytes, call.report_bytes)

    def _result_of(self, context: Context, run: Callable[[], Mapping[str, Any]]) -> Any:
        """Return what the function returned, by its run's log, or raise what it raised."""
        from airflow_provider_dstack._function_call import read_result
        from dstack_core.integration import RESULT_WARNING, FunctionCall, Masker, mask_value

        call = FunctionCall.for_reading(
            self.python_callable.__name__,
            serializer=self.serializer,
            max_result_bytes=self.max_result_bytes,
            allow_cloudpickle=self.allow_cloudpickle,
        )
        self._take_large_results(call)
        failure: DstackRunFailed | None = None
        try:
            outcome = run()
        except DstackRunFailed as error:
            failure, outcome = error, error.outcome
        hook = self.hook()
        secrets = [*self.secret_texts(), hook.token]
        value = read_result(
            call,
            self._key(context),
            outcome,
            failure,
            hook=hook,
            secrets=secrets,
            poll_interval=self.poll_interval,
            retry_budget=self.retry_budget,
            log=self.log,
            is_killed=lambda: self._killed,
        )
        shown = mask_value(value, Masker(secrets).mask)
        if shown is not value:
            self.log.warning("%s", RESULT_WARNING.format(what=call.name))
        return shown
