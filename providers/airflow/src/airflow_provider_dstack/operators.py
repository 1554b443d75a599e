"""Run a dstack task or service as a task of a DAG."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from airflow_provider_dstack import _names
from airflow_provider_dstack._compat import (
    AirflowFailException,
    AirflowTaskTimeout,
    BaseOperator,
    Context,
    conf,
    deferral_errors,
    mask_secret,
)
from airflow_provider_dstack._relay import DEFAULT_LOG_BUDGET
from airflow_provider_dstack._spec import at_least, one_of, refuse_hosts_names
from airflow_provider_dstack._stop import (
    KILL_LIMITS,
    ON_KILL_ACTIONS,
    OnKillAction,
    stop_patiently,
    was_ended,
)
from airflow_provider_dstack.errors import DstackRunInterrupted

if TYPE_CHECKING:
    import jinja2

    from airflow_provider_dstack._job import JobOptions, RunJob
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client, Configuration, Resources, RetryPolicy, Run, SpotPolicy

_SYNC_SECONDS = 5.0
_QUICK_POLL_SECONDS = 1.0
_BACKSTOP_SECONDS = 60.0
# A worker may report the end of a deferral five seconds late, and the scheduler read it a second later.
_SETTLE_SECONDS = 8.0


class DstackRunOperator(BaseOperator):
    """Submit one run, relay its log, and succeed or fail as it does; return its outcome.

    ``configuration``: a ``dstack_core.Task`` or ``Service``, a dict as in YAML, YAML text, or the path of
    a ``.yml`` or ``.yaml`` file relative to the DAG's folder (a ``pathlib.Path`` for any other place).
    ``run_name`` (str) defaults to a name that is new for every try; a ``name`` in the configuration is for
    interactive use and is not taken. ``run_resources`` (``Resources`` or dict), ``spot_policy``,
    ``run_retry_policy`` (``RetryPolicy`` or dict: how long to wait for capacity), ``max_duration`` (seconds,
    ``"2h"`` or ``"off"``), ``max_price`` (USD per hour), ``working_dir``, ``backends`` are as for
    ``dstack_core``'s ``runs.submit``; two have a prefix because ``resources`` and ``retry_policy`` are
    Airflow's own.

    ``dstack_conn_id`` names the connection, ``project_name`` replaces its project. With ``deferrable`` the
    worker's slot is given back while the run goes on. ``on_kill_action``: ``"stop"``, ``"abort"`` or
    ``"keep"`` the run when the task is killed, times out or loses sight of it. ``poll_interval`` (seconds)
    is the time between looks, ``retry_budget`` (seconds) how long a silent server is borne. ``get_logs``
    (bool) relays the log, ``log_budget_bytes`` of it at most; the rest is counted and linked.

    Raises ``AirflowFailException`` for input or access that is wrong, else the errors of
    ``airflow_provider_dstack.errors``. Source: Airflow documentation, "Operators" and "Deferrable
    Operators & Triggers".
    """

    template_fields: Sequence[str] = (
        "configuration",
        "run_name",
        "run_resources",
        "spot_policy",
        "run_retry_policy",
        "max_duration",
        "max_price",
        "working_dir",
        "backends",
        "dstack_conn_id",
        "project_name",
    )
    template_ext: Sequence[str] = (".yml", ".yaml")
    template_fields_renderers: ClassVar[dict[str, str]] = {"configuration": "yaml"}
    ui_color = "#e8e4ff"

    def __init__(
        self,
        *,
        configuration: Configuration | Mapping[str, Any] | str | os.PathLike[str],
        run_name: str | None = None,
        run_resources: Resources | Mapping[str, Any] | None = None,
        spot_policy: SpotPolicy | str | None = None,
        run_retry_policy: RetryPolicy | Mapping[str, Any] | None = None,
        max_duration: int | str | None = None,
        max_price: float | str | None = None,
        working_dir: str | None = None,
        backends: Sequence[str] | str | None = None,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        on_kill_action: OnKillAction = "stop",
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        get_logs: bool = True,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        **kwargs: Any,
    ) -> None:
        refuse_hosts_names(kwargs)
        super().__init__(**kwargs)
        self.configuration = configuration
        self.run_name = run_name
        self.run_resources = run_resources
        self.spot_policy = spot_policy
        self.run_retry_policy = run_retry_policy
        self.max_duration = max_duration
        self.max_price = max_price
        self.working_dir = working_dir
        self.backends = backends
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.deferrable = deferrable
        self.on_kill_action = one_of("on_kill_action", on_kill_action, ON_KILL_ACTIONS)
        self.poll_interval = at_least("poll_interval", poll_interval, 0.1)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.get_logs = get_logs
        self.log_budget_bytes = log_budget_bytes
        self._job: RunJob | None = None
        self._killed = False

    def execute(self, context: Context) -> dict[str, Any]:
        """Run and return ``Outcome.to_dict()``; when ``deferrable``, hand a longer run to the triggerer."""
        from airflow_provider_dstack._outcome import as_airflow_error, result_of

        job = self._job = self._prepare(context)
        if not self._killed:
            job.follow()
        if self._killed and not job.killed and job.submitted:
            # The kill came just after the threads had handed the run over.
            job.stop()
        if job.killed or self._killed:
            raise DstackRunInterrupted(job.interruption())
        if job.error is not None:
            raise as_airflow_error(job.error, submitted=job.submitted) from job.error
        if job.outcome is not None:
            return result_of(job.outcome, job.relay.tail)
        return self._defer(job, context)

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outcome that the trigger reported, or raise what it says."""
        from airflow_provider_dstack import _outcome

        if event["kind"] == _outcome.FINISHED:
            from airflow_provider_dstack import _checkpoint
            from dstack_core import Outcome

            with suppress(Exception):
                _checkpoint.forget(context["ti"])

            return _outcome.result_of(Outcome.from_dict(event["outcome"]), event["tail"])
        if event["kind"] == _outcome.TIMED_OUT:
            if not event["stopped"]:
                self._stop_leftover(context)
            raise AirflowTaskTimeout(
                f"execution_timeout of {self.execution_timeout} passed while run "
                f"{self._name_for(context)} was going"
            )
        self._stop_leftover(context)
        raise _outcome.broken_error(event)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Go on after the deferral; when that timed out or its trigger broke, stop the run first."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except deferral_errors():
            self._stop_leftover(context)
            raise

    def on_kill(self) -> None:
        """Have the run stopped, unless ``on_kill_action`` is ``"keep"``; takes at most 3.5 seconds.

        Called in a signal handler, so it sets attributes and sleeps, nothing else. Source: Airflow
        documentation, "Operators".
        """
        self._killed = True
        if self._job is not None:
            self._job.kill()

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        """Render the templates, and have secrets hidden before the rendered fields are shown anywhere."""
        from jinja2 import TemplateNotFound

        from airflow_provider_dstack._spec import secrets_in
        from dstack_core import ConfigurationError

        try:
            super().render_template_fields(context, jinja_env)
        except TemplateNotFound as error:
            raise AirflowFailException(
                f"configuration: there is no file {error.name!r} in the DAG's folder or in its "
                "template_searchpath; correct the path, or pass a pathlib.Path for a file elsewhere"
            ) from None
        except ConfigurationError as error:
            raise AirflowFailException(error.message) from None
        for secret in secrets_in(self.configuration):
            mask_secret(secret)

    def render_template(
        self,
        content: Any,
        context: Context,
        jinja_env: jinja2.Environment | None = None,
        seen_oids: set[int] | None = None,
    ) -> Any:
        """Render templates also inside the models of ``dstack_core``."""
        from airflow_provider_dstack._spec import is_model, render_model

        if is_model(content):
            return render_model(
                content, lambda value: self.render_template(value, context, jinja_env, seen_oids)
            )
        return super().render_template(content, context, jinja_env, seen_oids)

    def _prepare(self, context: Context) -> RunJob:
        """Check the input and make both clients; nothing is sent."""
        from airflow_provider_dstack._job import JobOptions, RunJob
        from dstack_core import ConfigurationError

        hook, ti = self._hook(), context["ti"]
        quick = min(self.poll_interval, _QUICK_POLL_SECONDS)
        options = JobOptions(
            run_name=self._name_for(context),
            marker=_names.marker(ti),
            poll_interval=quick if self.deferrable else self.poll_interval,
            retry_budget=self.retry_budget,
            logs=self.get_logs,
            log_budget_bytes=self.log_budget_bytes,
            on_kill_action=self.on_kill_action,
            hand_over_after=_SYNC_SECONDS if self.deferrable else None,
            was_ended=lambda: was_ended(ti),
        )
        try:
            submit = self._submission(hook.client(retry_budget=self.retry_budget), options)
        except ConfigurationError as error:
            raise AirflowFailException(error.message) from None
        return RunJob(submit, hook.client(**KILL_LIMITS), options, self.log)

    def _submission(self, client: Client, options: JobOptions) -> Callable[[], Run]:
        from airflow_provider_dstack import _spec

        return partial(
            client.runs.submit,
            _spec.read_configuration(self.configuration),
            run_name=options.run_name,
            resources=_spec.read_resources(self.run_resources),
            spot_policy=self.spot_policy,
            retry_policy=_spec.read_retry_policy(self.run_retry_policy),
            max_duration=_spec.read_duration(self.max_duration),
            max_price=_spec.read_price(self.max_price),
            working_dir=self.working_dir,
            backends=_spec.read_backends(self.backends),
            marker=options.marker,
            retry_budget=self.retry_budget,
        )

    def _defer(self, job: RunJob, context: Context) -> NoReturn:
        from airflow_provider_dstack import _checkpoint
        from airflow_provider_dstack.triggers import DstackRunTrigger

        if job.progress is None:
            raise DstackRunInterrupted(f"run {job.run_name} was left before it was submitted")
        deadline = None
        if self.execution_timeout is not None:
            # Airflow itself does not look at execution_timeout while a task is deferred.
            started = context["ti"].start_date.timestamp()
            deadline = started + self.execution_timeout.total_seconds()
        trigger = DstackRunTrigger(
            dstack_conn_id=self.dstack_conn_id,
            project_name=job.project,
            run_name=job.run_name,
            marker=_names.marker(context["ti"]),
            progress=job.progress.to_dict(),
            **job.relay.state(),
            poll_interval=self.poll_interval,
            retry_budget=self.retry_budget,
            deadline=deadline,
            not_before=time.time() + _SETTLE_SECONDS,
            get_logs=self.get_logs,
            log_budget_bytes=self.log_budget_bytes,
            on_kill_action=self.on_kill_action,
        )
        with suppress(Exception):
            # Airflow complains about an XCom that is read before it was ever written.
            state = {"progress": trigger.progress, **job.relay.state()}
            _checkpoint.save(context["ti"], trigger.marker, state)
        left = None if deadline is None else max(0.0, deadline - time.time()) + _BACKSTOP_SECONDS
        self.defer(
            trigger=trigger,
            method_name="execute_complete",
            timeout=None if left is None else timedelta(seconds=left),
        )

    def _stop_leftover(self, context: Context) -> None:
        """Stop what a trigger may have left; the run is known by its name and marker alone."""
        if self.on_kill_action == "keep":
            return
        client, abort = self._hook().client(**KILL_LIMITS), self.on_kill_action == "abort"
        name, marker = self._name_for(context), _names.marker(context["ti"])
        stop_patiently(client, name, marker, abort=abort, log=self.log)

    def _hook(self) -> DstackHook:
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _name_for(self, context: Context) -> str:
        return self.run_name or _names.run_name(context["ti"])
