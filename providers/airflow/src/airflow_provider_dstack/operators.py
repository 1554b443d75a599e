"""Run a dstack task or service as a task of a DAG."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_dstack._compat import (
    AirflowTaskTimeout,
    Context,
    conf,
    deferral_errors,
)
from airflow_provider_dstack._relay import DEFAULT_LOG_BUDGET
from airflow_provider_dstack._spec import at_least, exit_codes, one_of, refuse_hosts_names
from airflow_provider_dstack._stop import (
    KEEP_ASKED_FOR,
    ON_KILL_ACTIONS,
    OnKillAction,
    log_kept,
    stop_task_run,
)
from airflow_provider_dstack._templates import TemplatedModels
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.links import RUN_NAME_KEY, RUN_URL_KEY, DstackRunLink, push

if TYPE_CHECKING:
    from airflow.sdk import BaseOperatorLink

    from airflow_provider_dstack._submission import OnActive
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.hooks import DstackHook
    from airflow_provider_dstack.reaper import DstackReapOperator
    from airflow_provider_dstack.services import DstackServiceOperator, DstackStopRunOperator
    from dstack_core import Configuration, Profile, Resources, RetryPolicy, Run, SpotPolicy

__all__ = ["DstackReapOperator", "DstackRunOperator", "DstackServiceOperator", "DstackStopRunOperator"]

_SYNC_SECONDS = 5.0


class DstackRunOperator(TemplatedModels):
    """Submit one run, relay its log, and succeed or fail as it does; return its outcome.

    ``configuration``: a ``dstack_core.Task`` or ``Service``, a dict as in YAML, YAML text, or the path of
    a ``.yml`` or ``.yaml`` file relative to the DAG's folder (a ``pathlib.Path`` for any other place).
    ``run_name`` (str) defaults to a name that is new for every try; of mapped tasks each gets its map index
    appended to a given one. A ``name`` in the configuration is for interactive use and is not taken.
    ``run_resources`` (``Resources``; a mapping or a text such as ``"24GB.."``, which mean what they mean in
    YAML), ``spot_policy``, ``run_retry_policy`` (``RetryPolicy``, bool, or a dict of either
    ``retry`` and ``limit`` or, as in YAML, ``on_events`` and ``duration``: how long to wait for capacity),
    ``max_duration`` (seconds, ``"2h"`` or ``"off"``), ``max_price`` (USD per hour), ``working_dir``,
    ``verify_ports``, ``backends`` are as for ``dstack_core``'s ``runs.submit``; two have a prefix because
    ``resources`` and ``retry_policy`` are Airflow's own, and ``verify_ports`` is off, for a worker attaches
    to nothing.

    ``env`` (dict) gives values to names of the configuration's ``env`` that have none, which else come from
    the worker's environment, and replaces others. ``args`` (list of str) fills ``${{ run.args }}``.
    ``profile`` (a name, or a ``Profile``) is looked up in ``profiles_file`` (path), else in
    ``.dstack/profiles.yml`` of ``repo_dir``; the default one there applies when none is named.

    ``repo_dir`` is a directory or Git checkout whose contents the run gets, relative to the DAG's folder.
    ``git_conn_id`` names a connection of Airflow's type ``git`` for the clone of a private repository;
    ``local_repo`` (bool) uploads a checkout instead of cloning it.

    ``dstack_conn_id`` names the connection, ``project_name`` replaces its project. With ``deferrable`` the
    worker's slot is given back while the run goes on. ``on_kill_action``: ``"stop"``, ``"abort"`` or
    ``"keep"`` the run when the task is killed, times out or loses sight of it. ``poll_interval`` (seconds)
    is the time between looks, ``retry_budget`` (seconds) how long a silent server is borne. ``get_logs``
    (bool) relays the log, ``log_budget_bytes`` of it at most (None: all); the rest is counted and linked.
    ``skip_on_exit_code`` (int or list of int) are exit statuses that skip the task.

    With ``durable`` a retry takes over the run of the try before when that is still active, or succeeded
    unseen; a run that failed, and a cleared task, start a new one. A worker that is shut down leaves the run
    to the next try.

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
        "env",
        "args",
        "profile",
        "profiles_file",
        "repo_dir",
        "git_conn_id",
        "dstack_conn_id",
        "project_name",
    )
    template_ext: Sequence[str] = (".yml", ".yaml")
    template_fields_renderers: ClassVar[dict[str, str]] = {"configuration": "yaml"}
    operator_extra_links: Collection[BaseOperatorLink] = (DstackRunLink(),)
    ui_color = "#e8e4ff"
    on_active: OnActive | None = None

    def __init__(
        self,
        *,
        configuration: Configuration | Mapping[str, Any] | str | os.PathLike[str],
        run_name: str | None = None,
        run_resources: Resources | Mapping[str, Any] | str | int | None = None,
        spot_policy: SpotPolicy | str | None = None,
        run_retry_policy: RetryPolicy | Mapping[str, Any] | bool | None = None,
        max_duration: int | str | None = None,
        max_price: float | str | None = None,
        working_dir: str | None = None,
        verify_ports: bool = False,
        backends: Sequence[str] | str | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] | None = None,
        profile: str | Profile | None = None,
        profiles_file: str | os.PathLike[str] | None = None,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        on_kill_action: OnKillAction = "stop",
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        get_logs: bool = True,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        repo_dir: str | os.PathLike[str] | None = None,
        local_repo: bool = False,
        git_conn_id: str | None = None,
        skip_on_exit_code: int | Sequence[int] | None = None,
        durable: bool = True,
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
        self.verify_ports = verify_ports
        self.backends = backends
        self.env = env
        self.args = args
        self.profile = profile
        self.profiles_file = profiles_file
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.deferrable = deferrable
        self.on_kill_action = one_of("on_kill_action", on_kill_action, ON_KILL_ACTIONS)
        self.poll_interval = at_least("poll_interval", poll_interval, 0.1)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.get_logs = get_logs
        self.repo_dir = repo_dir
        self.local_repo = local_repo
        self.git_conn_id = git_conn_id
        self.skip_on_exit_code = skip_on_exit_code
        self.durable = durable
        self._skip_on = exit_codes("skip_on_exit_code", skip_on_exit_code)
        self.log_budget_bytes = log_budget_bytes
        self._task_run: TaskRun | None = None
        self._killed = False

    def execute(self, context: Context) -> Any:
        """Run and return ``Outcome.to_dict()``; when ``deferrable``, hand a longer run to the triggerer."""
        from airflow_provider_dstack._build import task_run_of

        task_run = self._task_run = task_run_of(self, context, _SYNC_SECONDS if self.deferrable else None)
        try:
            if self._killed:
                task_run.kill()
            task_run.follow()
            result = self._conclude(task_run, context)
        except Exception:
            task_run.close()
            raise
        # Not after a deferral: a kill that comes before Airflow has accepted it still stops the run.
        task_run.close()
        return result

    def _conclude(self, task_run: TaskRun, context: Context) -> Any:
        """Return the task's result, or raise its error, by what became of its run."""
        from airflow_provider_dstack._outcome import as_airflow_error, result_of
        from airflow_provider_dstack._task_run import State

        if task_run.state is State.ENDED and task_run.outcome is not None:
            return result_of(task_run.outcome, task_run.relay.tail, self._skip_on)
        if task_run.state is State.HANDED_OVER:
            try:
                return self._hand_over(task_run, context)
            except DstackRunInterrupted:
                task_run.end()
                raise DstackRunInterrupted(task_run.interruption()) from None
            except (Exception, AirflowTaskTimeout):
                task_run.interrupt()
                raise
        if task_run.error is not None and not task_run.is_killed:
            raise as_airflow_error(task_run.error, submitted=task_run.submitted) from task_run.error
        raise DstackRunInterrupted(task_run.interruption())

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> Any:
        """Return the outcome that the trigger reported, or raise what it says."""
        from airflow_provider_dstack import _build, _outcome

        if event["kind"] == _outcome.FINISHED:
            from airflow_provider_dstack import _checkpoint
            from dstack_core import Outcome

            outcome, tail = Outcome.from_dict(event["outcome"]), event["tail"]
            if event.get("rest"):
                from airflow_provider_dstack._remaining_log import relay_remaining_log

                tail = relay_remaining_log(self, event, outcome, lambda: self._killed)
            # Not before: a worker that is lost in the log leaves the run to the next try.
            with suppress(Exception):
                _checkpoint.forget(context["ti"])
            if self.durable and outcome.succeeded:
                _build.ledger_of(self, context, outcome.project).forget()
            return _outcome.result_of(outcome, tail, self._skip_on)
        if event["kind"] == _outcome.TIMED_OUT:
            ref = _build.run_behind(self, context)
            if not event["stopped"]:
                self._stop_leftover(context)
            raise AirflowTaskTimeout(
                f"execution_timeout of {self.execution_timeout} passed before run {ref.name} ended"
            )
        error = _outcome.broken_error(event)
        self._stop_or_leave(context, error)
        raise error

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Resume after the deferral; where that timed out or failed, stop or keep the run first."""
        broken, timed_out = deferral_errors()
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except timed_out:
            self._stop_leftover(context)
            raise
        except broken as error:
            self._stop_or_leave(context, error)
            raise

    def on_kill(self) -> None:
        """Stop the run, or keep it for the next try; takes at most 4.3 seconds.

        Called in a signal handler, so it sets attributes and sleeps, nothing else. Source: Airflow
        documentation, "Operators".
        """
        self._killed = True
        if self._task_run is not None:
            self._task_run.kill()

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def announce(self, context: Context, run: Run) -> None:
        """Put the run's name and address where the link finds them while the task still runs."""
        push(context["ti"], RUN_NAME_KEY, run.name, self.log)
        push(context["ti"], RUN_URL_KEY, run.url, self.log)

    def readiness(self, context: Context) -> Callable[[Run], bool] | None:
        """Return what tells that a run is followed no longer, None when it is followed to its end."""
        return None

    def _hand_over(self, task_run: TaskRun, context: Context) -> Any:
        """Have the triggerer follow the run from here on; ``DstackRunInterrupted`` if the task was ended."""
        from airflow_provider_dstack._deferral import defer

        defer(self, task_run, context, lambda: self._killed)

    def _stop_leftover(self, context: Context) -> None:
        """Stop what a trigger may have left; the run is known by its name and marker alone."""
        from airflow_provider_dstack._build import run_behind

        ref = run_behind(self, context)
        with self.hook().client() as client:
            if self.on_kill_action == "keep":
                log_kept(ref.name, KEEP_ASKED_FOR, client.run_url(), self.log)
            else:
                stop_task_run(client, ref, action=self.on_kill_action, log=self.log)

    def _stop_or_leave(self, context: Context, error: Exception) -> None:
        """Leave the run to the task's next try when there is one after ``error``, else stop it."""
        from airflow_provider_dstack._build import leaves_run_to_next_try

        if leaves_run_to_next_try(self, context, error):
            self.log.warning("The run is kept for the task's next try.")
        else:
            self._stop_leftover(context)


def __getattr__(name: str) -> Any:
    """Load the other operators when they are first asked for: a class costs a DAG file time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "reaper" if name == "DstackReapOperator" else "services"
    return getattr(import_module(f"airflow_provider_dstack.{home}"), name)
