"""The operator behind ``@task.dstack``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator

from airflow_provider_dstack._compat import AirflowFailException, mask_secret
from airflow_provider_dstack._spec import one_of
from airflow_provider_dstack.errors import DstackError, DstackRunFailed
from airflow_provider_dstack.operators import DstackRunOperator

if TYPE_CHECKING:
    import jinja2

    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._function import Serializer
    from airflow_provider_dstack._job import JobOptions
    from dstack_core import Client, Configuration, RegistryAuth, Resources, Run

_MAX_RESULT_BYTES = 1024 * 1024


class DstackDecoratedOperator(DecoratedOperator, DstackRunOperator):
    """Run a Python function in a run and return what it returns; ``dstack_task`` tells the parameters."""

    template_fields: Sequence[str] = (
        "op_args",
        "op_kwargs",
        "image",
        "python",
        "env",
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
        env: Mapping[str, str] | None = None,
        commands: Sequence[str] = (),
        registry_auth: RegistryAuth | Mapping[str, str] | None = None,
        resources: Resources | Mapping[str, Any] | None = None,
        run_resources: Resources | Mapping[str, Any] | None = None,
        serializer: Serializer = "json",
        max_result_bytes: int = _MAX_RESULT_BYTES,
        **kwargs: Any,
    ) -> None:
        if inspect.iscoroutinefunction(python_callable):
            raise ValueError(
                f"{python_callable.__name__}: @task.dstack runs a plain function, not an async one"
            )
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            configuration={"type": "task"} if configuration is None else configuration,
            run_resources=resources or run_resources,
            **kwargs,
        )
        self.image = image
        self.python = python
        self.env = env
        self.commands = commands
        self.registry_auth = registry_auth
        self.serializer = one_of("serializer", serializer, ("json", "cloudpickle"))
        if max_result_bytes < 1:
            raise ValueError(f"max_result_bytes: {max_result_bytes!r} leaves no room for a result")
        self.max_result_bytes = max_result_bytes
        self._call: dict[str, Any] = {}

    def execute(self, context: Context) -> Any:
        """Run the function and return what it returned."""
        from airflow_provider_dstack._function import call_of

        self._call = call_of(self.python_callable, self.op_args, self._arguments(context), self.serializer)
        return self._result_of(lambda: super(DstackDecoratedOperator, self).execute(context))

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> Any:
        """Return what the function returned, once the trigger reported its end."""
        complete = super().execute_complete
        return self._result_of(lambda: complete(context, event))

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        """Render the templates, and have secrets hidden before the rendered fields are shown anywhere."""
        from airflow_provider_dstack._spec import secrets_in

        super().render_template_fields(context, jinja_env)
        secrets = {"type": "task", "env": self.env, "registry_auth": self.registry_auth}
        for secret in secrets_in({name: value for name, value in secrets.items() if value}):
            mask_secret(secret)

    def _arguments(self, context: Context) -> dict[str, Any]:
        """Return the keyword arguments, with those of Airflow's context that the function names."""
        names = list(inspect.signature(self.python_callable).parameters)[len(self.op_args) :]
        known: Mapping[str, Any] = context  # type: ignore[assignment]  # a TypedDict, asked for any key
        return {**{name: known[name] for name in names if name in known}, **self.op_kwargs}

    def _submission(self, client: Client, options: JobOptions) -> Callable[[], Run]:
        from airflow_provider_dstack._function import launcher, write_files

        self.configuration = self._with_function(launcher(options.marker, self.image))
        code = TemporaryDirectory(prefix="dstack-task-")
        write_files(Path(code.name), self._call, options.marker, self.max_result_bytes)
        with_code = self._hook().client(retry_budget=self.retry_budget, repo_dir=code.name)
        submit = super()._submission(with_code, options)

        def submit_and_clean() -> Run:
            with code:
                return submit()

        return submit_and_clean

    def _with_function(self, command: str) -> Configuration:
        """Return the configuration with what the decorator's own parameters add to it."""
        from airflow_provider_dstack._spec import read_configuration

        base = read_configuration(self.configuration)
        if base.type != "task":
            raise AirflowFailException(f"configuration: @task.dstack runs a task, not a {base.type}")
        given = {
            "image": self.image,
            "python": self.python,
            "env": {**base.env, **(self.env or {})} if isinstance(base.env, dict) else self.env,
            "registry_auth": self.registry_auth,
            "commands": [*(base.commands or []), *self.commands, command],
        }
        fields = {name: getattr(base, name) for name in base.model_fields_set}
        fields.update({name: value for name, value in given.items() if value})
        return type(base).model_validate(fields)

    def _result_of(self, run: Callable[[], Mapping[str, Any]]) -> Any:
        from airflow_provider_dstack._function import value_of

        name = self.python_callable.__name__
        try:
            outcome = run()
        except DstackRunFailed as error:
            frame = self._frame(error.outcome, wait=False) or {}
            if frame.get("kind") == "unusable":
                raise AirflowFailException(f"{name}: {frame['message']}") from None
            if frame.get("kind") == "raised":
                lines = "".join(f"\n  {line}" for line in frame["traceback"])
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
            with self._hook().client(retry_budget=self.retry_budget) as client:
                return read_back(client, outcome["run_name"], outcome["run_id"], wait=wait)
        except CoreError as error:
            if wait:
                raise as_airflow_error(error, submitted=True) from error
            self.log.warning("The log of run %s cannot be read: %s", outcome["run_name"], error)
            return None
