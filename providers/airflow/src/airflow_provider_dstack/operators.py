"""Run a dstack task or service as a task of a DAG."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow_provider_dstack._callbacks import check_callbacks, since_in
from airflow_provider_dstack._compat import (
    AirflowTaskTimeout,
    Context,
    conf,
    deferral_errors,
)
from airflow_provider_dstack._fallbacks import check_fallbacks
from airflow_provider_dstack._log_relay import DEFAULT_LOG_BUDGET
from airflow_provider_dstack._parameters import (
    DEFAULT_REPORTS,
    RETURNS,
    Returns,
    at_least,
    check_literals,
    check_survive,
    exit_codes,
    log_budget,
    mask_env_of,
    most,
    one_of,
    refuse_hosts_names,
    yes_or_no,
)
from airflow_provider_dstack._stop import (
    KEEP_ASKED_FOR,
    ON_KILL_ACTIONS,
    OnKillAction,
    log_kept,
    stop_task_run,
)
from airflow_provider_dstack._templates import TemplatedModels
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted
from airflow_provider_dstack.links import (
    LOGS_URL_KEY,
    METRICS_URL_KEY,
    OUTCOME_KEY,
    RUN_LINKS,
    RUN_NAME_KEY,
    RUN_URL_KEY,
    push,
)

if TYPE_CHECKING:
    from airflow.sdk import BaseOperatorLink

    from airflow_provider_dstack._run_reports import RunReports
    from airflow_provider_dstack._submission import OnActive
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.hooks import DstackHook
    from airflow_provider_dstack.triggers import DstackRunTrigger
    from dstack_core import (
        CallbacksLike,
        Configuration,
        Outcome,
        Profile,
        Resources,
        RetryPolicy,
        Run,
        SpotPolicy,
        Survive,
    )
    from dstack_core.integration import CallbackNotifier, MaskEnv

__all__ = ["DstackRunOperator"]

# A deferrable task follows its run for this long in the worker. A run that ends sooner, or is refused, is
# reported without a triggerer; more seconds keep the worker's slot for nothing.
_SYNC_SECONDS = 5.0
# Switches, choices and numbers that are checked when the DAG is parsed: a template would make them a text.
# All other parameters are templates.
_NOT_TEMPLATES = frozenset(
    {
        "self",
        "kwargs",
        "verify_ports",
        "deferrable",
        "on_kill_action",
        "poll_interval",
        "retry_budget",
        "get_logs",
        "log_budget_bytes",
        "log_timestamps",
        "log_groups",
        "relay_log_again",
        "local_repo",
        "skip_on_exit_code",
        "durable",
        "reports",
        "returns",
        "max_report_bytes",
        "max_reports_per_second",
        "callbacks",
        "mask_env",
    }
)


class DstackRunOperator(TemplatedModels):
    """An operator that submits one run, relays its log, and succeeds or fails as it does.

    With ``durable`` a retry takes over the run of the previous try if that is still active, or succeeded
    unnoticed; after a run that failed, or after a clear, the task starts a new one. A worker that is shut
    down leaves the run to the next try.

    Args:
        configuration: A ``dstack_core.Task`` or ``Service``, a dict as in YAML, YAML text, or the path of a
            ``.yml`` or ``.yaml`` file relative to the DAG's folder (a ``pathlib.Path`` for any other place).
            A ``name`` in it is for interactive use and is ignored.
        run_name: The run's name; mapped tasks append their map index to it. Default: a new name for every
            try.
        run_resources: ``Resources``, whose numbers are minimums; or a mapping or a text such as ``"24GB.."``,
            with the same meaning as in YAML. Default: those of the configuration. The prefix ``run_`` is
            needed because ``resources`` is an argument of Airflow itself.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``. Default: the configuration's, else the
            server's choice.
        run_retry_policy: How long to wait for capacity: a ``RetryPolicy``, True, False, or a dict of either
            ``retry`` and ``limit`` or, as in YAML, ``on_events`` and ``duration``. Default: the
            configuration's. The prefix is needed because ``retry_policy`` is an argument of Airflow itself.
        max_duration: The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``. Default:
            the configuration's.
        max_price: The highest price, in USD per hour. Default: the configuration's, else no limit.
        max_cost: The most that the run may cost in all, in USD. It is stopped there, and the task is not
            tried again. The server gets a ``max_duration`` too, for which the money lasts at the highest
            price on offer. Default: no limit.
        working_dir: Where commands start: relative to the code's directory, absolute, or ``~/x``. Default:
            the configuration's, else the code's directory, else the image's own.
        verify_ports: Check that the local ports of ``ports`` are free. Default: False, since a worker
            attaches to nothing.
        backends: The only backends to take machines from: a list, or one name. Default: the configuration's,
            else all of the project's.
        env: Values for the names in the configuration's ``env`` that have none; it also replaces values and
            adds variables. Names that are still without a value get it from the worker's environment.
            Default: none.
        args: The arguments that replace ``${{ run.args }}`` in commands, a list of texts. Default: none.
        profile: The name of a profile, or a ``Profile``. Default: the one marked ``default`` in the file.
        reports: Whether the commands of a task get ``$DSTACK_RESULT_FILE``, whose content becomes the run's
            result, and the Python module ``dstack_report`` (servers from 0.19.17 on). Default True.
        tags: Tags that the run's machine gets at its cloud, beside the automatic ones (``airflow-dag``,
            ``airflow-task`` and others) and the connection's ``default_tags``; a key of the configuration
            keeps its value. False: only the configuration's. Default: none of its own.
        survive: What the run survives instead of ending, within the same try: a ``Survive``, a dict of its
            fields, or only for how long in all, seconds or ``"4h"``. A spot machine that is taken away, and
            no capacity, then begin another attempt of the same run. Not with ``run_retry_policy``. Default:
            nothing.
        debug_on_failure: How long the container is held after the commands of a task have failed, for a
            person who opens a shell in it: seconds or ``"30m"``. The task fails at once, and a retry is a new
            run. Default: not at all.
        fallbacks: What is tried instead, within the same try, when the run ends for lack of a machine: a list
            of dicts of ``resources``, ``spot_policy``, ``backends``, ``max_price``, ``max_duration``,
            ``retry_policy`` and ``survive``, each for a run of its own. Default: none.
        fallback_on_exit: Exit statuses that lead to a fallback, too: ``{137: "next"}``, or the number of a
            step, from 2 on. Default: none.
        profiles_file: The path of a ``profiles.yml``. Default: ``.dstack/profiles.yml`` of ``repo_dir``.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        deferrable: Give the worker's slot back while the run keeps running. Default: Airflow's setting
            ``[operators] default_deferrable``.
        on_kill_action: What happens to the run when the task is killed, times out or cannot follow it any
            more: ``"stop"``, ``"abort"`` or ``"keep"``. Default ``"stop"``.
        poll_interval: Seconds between two status requests, 0.1 or more. Default 5.
        retry_budget: Seconds to keep retrying an unreachable server; the run keeps running meanwhile. Default
            600.
        get_logs: Relay the log. Default True.
        log_budget_bytes: How many bytes of the log to relay; the rest is left out and linked. None: all.
            Default 10 MB.
        log_timestamps: Begin each line with the time at which the server logged it (UTC). Default False.
        log_groups: Fold what is logged while the run is provisioned and its image is pulled. Airflow shows a
            group closed. Default False.
        relay_log_again: After a deferral, relay again on the worker what the triggerer has relayed, for an
            Airflow whose triggerers and API server share neither a log folder nor remote logging: there the
            triggerer's lines vanish when the task has ended. Elsewhere such lines appear twice. Default:
            Airflow's setting ``[dstack] relay_log_again``, else False.
        mask_env: Which values of the environment are masked in logs, errors, results and rendered fields:
            ``"secrets"`` for those whose name (``HF_TOKEN``) or form (``postgres://user:password@host``)
            looks secret, or that come from a connection or secret variable; ``"all"``; ``"none"`` for the
            last kind alone; or a list of names beside those of ``"secrets"``, which the run's environment
            must have unless they are of ``default_args``. Default ``"secrets"``.
        repo_dir: A directory or Git checkout whose contents the run gets, relative to the DAG's folder.
            Default: none.
        local_repo: Upload a checkout instead of having the run clone it. Default False.
        git_conn_id: A connection of Airflow's type ``git`` for the clone of a private repository. Default:
            none.
        skip_on_exit_code: One or several exit statuses that skip the task. Default: none.
        durable: Whether a retry takes over the run of the previous try. Default True.
        returns: ``"outcome"``, or ``"result"`` for what the run reported as its result. Default
            ``"outcome"``.
        max_report_bytes: Most bytes of a message that the run reports. Default: None, 1 MiB.
        max_reports_per_second: Most messages that are kept per second; results, checkpoints and assets are
            always kept. Default: None, 1000.
        callbacks: What is called while the run is followed: a class with methods of
            ``dstack_core.RunCallbacks``, its path (``"my_package.alerts.Alerts"``), or a list of those. An
            error in one is logged and does not fail the task. A deferrable task needs classes that the
            triggerer can import. Default: none.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        The run's outcome as a dict, as ``dstack_core.Outcome.to_dict()`` returns it; or its result, by
        ``returns``. If the run did not succeed, its outcome is the XCom ``dstack_outcome``. What else a run
        reports is in the XComs ``dstack_metrics``, ``dstack_links``, ``dstack_tables``, ``dstack_assets`` and
        ``dstack_checkpoint``.

    Raises:
        ValueError: A parameter that is not a template is wrong; the DAG cannot be parsed.
        AirflowFailException: Input or access is wrong; no retry can help.
        AirflowSkipException: The run's exit status is in ``skip_on_exit_code``, or the run succeeded and
            reported that the task is to be skipped.
        DstackError: Otherwise, one of ``airflow_provider_dstack.errors``.

    Example:
        ``DstackRunOperator(task_id="train", configuration="train.dstack.yml", run_resources="24GB..")``

    Source: Airflow documentation, "Operators" and "Deferrable Operators & Triggers".
    """

    template_ext: Sequence[str] = (".yml", ".yaml")
    template_fields_renderers: ClassVar[dict[str, str]] = {"configuration": "yaml"}
    operator_extra_links: Collection[BaseOperatorLink] = RUN_LINKS
    ui_color = "#e8e4ff"
    on_active: OnActive | None = None

    # For type checkers: ``__init__`` sets what is a template by the parameter's name.
    run_name: str | None
    run_resources: Resources | Mapping[str, Any] | str | int | None
    spot_policy: SpotPolicy | str | None
    run_retry_policy: RetryPolicy | Mapping[str, Any] | bool | None
    max_duration: int | str | None
    max_price: float | str | None
    max_cost: float | str | None
    working_dir: str | None
    backends: Sequence[str] | str | None
    env: Mapping[str, str] | None
    args: Sequence[str] | None
    profile: str | Profile | None
    tags: Mapping[str, str] | Literal[False] | None
    profiles_file: str | os.PathLike[str] | None
    dstack_conn_id: str
    project_name: str | None
    repo_dir: str | os.PathLike[str] | None
    git_conn_id: str | None
    survive: Survive | Mapping[str, Any] | int | str | bool | None
    debug_on_failure: int | str | None
    fallbacks: Sequence[Mapping[str, Any]] | str | None
    fallback_on_exit: Mapping[int, int | Literal["next"]] | str | None

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
        max_cost: float | str | None = None,
        working_dir: str | None = None,
        verify_ports: bool = False,
        backends: Sequence[str] | str | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] | None = None,
        profile: str | Profile | None = None,
        tags: Mapping[str, str] | Literal[False] | None = None,
        profiles_file: str | os.PathLike[str] | None = None,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        on_kill_action: OnKillAction = "stop",
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        get_logs: bool = True,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        log_timestamps: bool = False,
        log_groups: bool = False,
        relay_log_again: bool = conf.getboolean("dstack", "relay_log_again", fallback=False),
        repo_dir: str | os.PathLike[str] | None = None,
        local_repo: bool = False,
        git_conn_id: str | None = None,
        skip_on_exit_code: int | Sequence[int] | None = None,
        durable: bool = True,
        reports: bool = DEFAULT_REPORTS,
        survive: Survive | Mapping[str, Any] | int | str | bool | None = None,
        debug_on_failure: int | str | None = None,
        fallbacks: Sequence[Mapping[str, Any]] | str | None = None,
        fallback_on_exit: Mapping[int, int | Literal["next"]] | str | None = None,
        returns: Returns = "outcome",
        max_report_bytes: int | None = None,
        max_reports_per_second: int | None = None,
        callbacks: CallbacksLike = None,
        mask_env: MaskEnv = "secrets",
        **kwargs: Any,
    ) -> None:
        # Before anything else: at this point the local variables are the parameters.
        given = locals()
        refuse_hosts_names(kwargs)
        super().__init__(**kwargs)
        for name in DstackRunOperator.template_fields:
            setattr(self, name, given[name])
        check_literals(tags=tags, debug_on_failure=debug_on_failure, max_cost=max_cost)
        check_survive(survive)
        check_fallbacks(fallbacks, fallback_on_exit)
        self.verify_ports = yes_or_no("verify_ports", verify_ports)
        self.deferrable = yes_or_no("deferrable", deferrable)
        self.on_kill_action = one_of("on_kill_action", on_kill_action, ON_KILL_ACTIONS)
        self.poll_interval = at_least("poll_interval", poll_interval, 0.1)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.get_logs = yes_or_no("get_logs", get_logs)
        self.local_repo = yes_or_no("local_repo", local_repo)
        self.skip_on_exit_code = skip_on_exit_code
        self.durable = yes_or_no("durable", durable)
        self.reports = yes_or_no("reports", reports)
        self.returns = one_of("returns", returns, RETURNS)
        if returns == "result" and not get_logs:
            raise ValueError(
                'returns="result": expected get_logs=True, got False. The result is in the log. Set '
                "log_budget_bytes=0 to read the log and not show it."
            )
        self.max_report_bytes = most("max_report_bytes", max_report_bytes, 64)
        self.max_reports_per_second = most("max_reports_per_second", max_reports_per_second, 1)
        self.callbacks = check_callbacks(callbacks, deferrable=deferrable)
        self.mask_env = mask_env_of(mask_env)
        self.skip_statuses = exit_codes("skip_on_exit_code", skip_on_exit_code)
        self.log_budget_bytes = log_budget(log_budget_bytes)
        self.log_timestamps = yes_or_no("log_timestamps", log_timestamps)
        self.log_groups = yes_or_no("log_groups", log_groups)
        self.relay_log_again = yes_or_no("relay_log_again", relay_log_again)
        self._task_run: TaskRun | None = None
        self._killed = False
        self._outcome: Outcome | None = None
        self._assets: Sequence[Mapping[str, Any]] = ()

    # Airflow renders what has a parameter's name, so a new parameter is a template unless it is named above.
    template_fields: Sequence[str] = tuple(
        name for name in signature(__init__).parameters if name not in _NOT_TEMPLATES
    )

    def execute(self, context: Context) -> Any:
        """Run and return ``Outcome.to_dict()``; when ``deferrable``, hand a longer run to the triggerer."""
        from airflow_provider_dstack._from_operator import task_run_of

        return self._carry_out(task_run_of(self, context, self._hand_over_after()), context)

    def _hand_over_after(self) -> float | None:
        return _SYNC_SECONDS if self.deferrable else None

    def _carry_out(self, task_run: TaskRun, context: Context) -> Any:
        self._task_run = task_run
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
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._task_run import State

        if task_run.state is State.ENDED and task_run.outcome is not None:
            since = {} if task_run.progress is None else task_run.progress.since
            self._note_end(task_run.outcome, since, task_run.reports)
            relay = task_run.relay
            result = self._outcome_of(context, task_run.outcome, relay.tail, is_tail_shown=relay.shows_tail)
            return self._succeed(context, task_run.outcome, result, task_run.reports)
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
            raise_as_airflow_error(task_run.error, submitted=task_run.submitted)
        raise DstackRunInterrupted(task_run.interruption())

    def _outcome_of(
        self, context: Context, outcome: Outcome, tail: Sequence[str], *, is_tail_shown: bool = False
    ) -> dict[str, Any]:
        """Return the outcome of a run that succeeded; else push it as an XCom, and raise the task's error."""
        from airflow_provider_dstack._outcome import result_of
        from dstack_core.integration import Masker, mask_result, outcome_dict

        if not outcome.succeeded:
            if outcome.has_result or outcome.metrics:
                hide = Masker([*self.secret_texts(), self.hook().token]).mask
                outcome = mask_result(outcome, hide, lambda warning: None)
            push(context["ti"], OUTCOME_KEY, outcome_dict(outcome), self.log)
        return result_of(outcome, tail, self.skip_statuses, is_tail_shown=is_tail_shown)

    def _succeed(
        self, context: Context, outcome: Outcome, result: dict[str, Any], reports: RunReports
    ) -> Any:
        """Return the task's value for a run that succeeded, and describe the assets that it has written."""
        from airflow_provider_dstack._outcome import what_task_returns
        from airflow_provider_dstack._run_reports import describe_outlets
        from dstack_core.integration import RESULT_WARNING, Masker, mask_result

        if outcome.has_result or outcome.metrics:
            hide = Masker([*self.secret_texts(), self.hook().token]).mask
            outcome = mask_result(outcome, hide, reports.note_secrets)
            result = {**result, "result": outcome.result, "metrics": dict(outcome.metrics)}
            if reports.has_secrets:
                self.log.warning("%s", RESULT_WARNING.format(what=f"run {outcome.run_name}"))
        value = what_task_returns(
            outcome, result, returns=self.returns, skip=reports.skip, reports=self.reports
        )
        describe_outlets(context, self.outlets, outcome, reports, self.log)
        return value

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> Any:
        """Return the outcome that the trigger reported, or raise the error that it reported."""
        from airflow_provider_dstack import _from_operator, _outcome

        if event["kind"] == _outcome.FINISHED:
            from airflow_provider_dstack._next_step import after_step
            from airflow_provider_dstack._resumed_log import finish_log
            from airflow_provider_dstack._run_reports import RunReports, push_reports
            from airflow_provider_dstack._trigger_relay import forget
            from dstack_core import Outcome
            from dstack_core.integration import mask

            outcome = Outcome.from_dict(event["outcome"])
            secrets = list(self.secret_texts())
            notifier = self._notifier(context, secrets)
            reports = RunReports(
                (event.get("rest") or event).get("reported"), lambda text: mask(text, secrets)
            )
            rest = finish_log(self, event, outcome, reports, secrets, notifier, lambda: self._killed)
            following = after_step(self, context, event, rest, reports, self._hand_over_after())
            if not isinstance(following, Outcome):
                self._finish_calls(notifier)
                push_reports(context["ti"], reports.xcoms(), reports, self.log)
                with suppress(Exception):
                    forget(context["ti"])
                return self._carry_out(following, context)
            outcome, tail, is_tail_shown = following, rest.tail, rest.is_tail_shown
            # Before anything can fail the task: the run has ended in any case.
            notifier.ended(outcome)
            self._finish_calls(notifier)
            self._note_end(outcome, since_in(event), reports)
            if self.returns == "result" and not (rest.is_whole or outcome.has_result):
                # Before the record is deleted: the next try takes over the run that succeeded.
                self._outcome_of(context, outcome, tail)
                raise DstackError(
                    f"Could not read the result of run {outcome.run_name} in its log. See {outcome.url}"
                )
            # Those that triggers could not push, and what came since they last did.
            push_reports(context["ti"], reports.xcoms(), reports, self.log)
            # Only after the log: a worker that is lost while relaying it leaves the run to the next try.
            with suppress(Exception):
                forget(context["ti"])
            if self.durable and outcome.succeeded:
                _from_operator.ledger_of(self, context, outcome.project).forget()
            result = self._outcome_of(context, outcome, tail, is_tail_shown=is_tail_shown)
            return self._succeed(context, outcome, result, reports)
        from airflow_provider_dstack._resumed_log import relay_what_was_shown

        if event["kind"] == _outcome.TIMED_OUT:
            name = (event.get("steps") or {}).get("run_name")
            name = name or _from_operator.run_behind(self, context).name
            if not event["stopped"]:
                self._stop_leftover(context)
            relay_what_was_shown(self, event, lambda: self._killed)
            raise AirflowTaskTimeout(
                f"execution_timeout of {self.execution_timeout} passed before run {name} ended."
            )
        error = _outcome.broken_error(event)
        self._stop_or_leave(context, error)
        relay_what_was_shown(self, event, lambda: self._killed)
        raise error

    def _finish_calls(self, notifier: CallbackNotifier) -> None:
        """Wait until the callbacks have returned. A kill ends the wait."""
        for pause in notifier.pauses():
            if self._killed:
                break
            time.sleep(pause)

    def before_submission(self, context: Context) -> None:
        """Make what a resumed task submits; ``execute`` has made it for step 1."""

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """Return the lineage of the run that has ended, for Airflow's OpenLineage provider.

        Source: documentation of that provider, "Implementing OpenLineage in Operators".
        """
        from airflow_provider_dstack._lineage import facets

        return facets(self._outcome, self._assets)

    def _note_end(self, outcome: Outcome, since: Mapping[str, float], reports: RunReports) -> None:
        """Keep how the run ended for lineage, and add it to metrics and traces."""
        from airflow_provider_dstack._callbacks import report_end

        self._outcome, self._assets = outcome, reports.assets
        report_end(outcome, since, self.log)

    def _notifier(self, context: Context, secrets: Sequence[str]) -> CallbackNotifier:
        """Return what calls the callbacks in a task that resumes."""
        from airflow_provider_dstack._callbacks import load_what_can_be, new_notifier
        from dstack_core.integration import Masker

        callbacks = load_what_can_be(self.callbacks, self.log)
        known = [*secrets, self.hook().token] if callbacks else []
        return new_notifier(callbacks, context["ti"], self.log, Masker(known).mask)

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
        """Put the run's name and addresses where the links find them while the task still runs."""
        push(context["ti"], RUN_NAME_KEY, run.name, self.log)
        push(context["ti"], RUN_URL_KEY, run.url, self.log)
        push(context["ti"], LOGS_URL_KEY, run.logs_url, self.log)
        if run.metrics_url is not None:
            push(context["ti"], METRICS_URL_KEY, run.metrics_url, self.log)

    def readiness(self, context: Context) -> Callable[[Run], bool] | None:
        """Return a check that ends following the run early, or None to follow it to its end."""
        return None

    def trigger_type(self) -> type[DstackRunTrigger]:
        """Return the class of the trigger that follows the run while the task is deferred."""
        from airflow_provider_dstack.triggers import DstackRunTrigger

        return DstackRunTrigger

    def _hand_over(self, task_run: TaskRun, context: Context) -> Any:
        """Have the triggerer follow the run from here on; ``DstackRunInterrupted`` if the task was ended."""
        from airflow_provider_dstack._from_operator import defer

        defer(self, task_run, context, lambda: self._killed)

    def _stop_leftover(self, context: Context) -> None:
        """Stop what a trigger may have left; the run is known by its name and marker alone."""
        from airflow_provider_dstack._from_operator import fallbacks_of, names_of, run_behind
        from airflow_provider_dstack._previous_try import as_submitted

        ref = run_behind(self, context)
        with self.hook().client() as client:
            if self.on_kill_action == "keep":
                log_kept(ref.name, KEEP_ASKED_FOR, client.run_url(), self.log)
            else:
                ref = as_submitted(client, ref, names_of(self, context), fallbacks_of(self), self.log)
                stop_task_run(client, ref, action=self.on_kill_action, log=self.log)

    def _stop_or_leave(self, context: Context, error: Exception) -> None:
        """Leave the run to the task's next try when there is one after ``error``, else stop it."""
        from airflow_provider_dstack._from_operator import leaves_run_to_next_try

        if leaves_run_to_next_try(self, context, error):
            self.log.warning("The run is kept for the task's next try.")
        else:
            self._stop_leftover(context)
