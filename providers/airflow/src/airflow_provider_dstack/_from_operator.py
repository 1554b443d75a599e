"""Make what a try works with from its operator's fields: its task run, and the trigger that takes over."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from airflow_provider_dstack._callbacks import load_callbacks, new_notifier
from airflow_provider_dstack._compat import AirflowFailException, mask_secret, task_state, task_state_store
from airflow_provider_dstack._lineage import lineage_env
from airflow_provider_dstack._names import TaskNames
from airflow_provider_dstack._run_reports import push_reports
from airflow_provider_dstack._stop import was_ended
from airflow_provider_dstack._tags import automatic_tags
from airflow_provider_dstack.errors import DstackRunInterrupted

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._previous_try import Ledger
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.operators import DstackRunOperator
    from dstack_core import Client, Configuration, Profile
    from dstack_core.integration import Fallbacks, RunRef, Steps

# Before a run is handed over, its first statuses should be seen, although ``poll_interval`` may be longer.
_QUICK_POLL_SECONDS = 1.0
# Airflow's own timeout of a deferral comes so long after the deadline at which the trigger stops the run. If
# Airflow's comes first, the run is stopped a second time, by the worker.
BACKSTOP_SECONDS = 60.0
# A worker may report the end of a deferral five seconds late, and the scheduler read it a second later. An
# event that comes earlier fails the task.
SETTLE_SECONDS = 8.0


class Resumed(NamedTuple):
    """The step of a task with fallbacks that has ended while the task was deferred, before another one.

    ``shown`` is as ``resumed`` of ``TaskRunOptions``, ``deadline`` in seconds since the epoch.
    """

    ref: RunRef
    shown: Mapping[str, Any]
    deadline: float | None


def task_run_of(
    operator: DstackRunOperator,
    context: Context,
    hand_over_after: float | None,
    resumed: Resumed | None = None,
) -> TaskRun:
    """Return the task run of a try; ``hand_over_after`` in seconds, None to follow the run to its end.

    With ``resumed`` it begins with the step that is next; the caller sets that in its ``ladder.steps``. One
    client serves all of it. Raises ``AirflowFailException`` when the input or the connection is wrong.
    """
    from airflow_provider_dstack._parameters import in_words_of_operator, report_limits
    from airflow_provider_dstack._submission import Submission
    from airflow_provider_dstack._task_run import TaskRun, TaskRunOptions
    from dstack_core import ConfigurationError

    hook, names = operator.hook(), names_of(operator, context)
    callbacks = load_callbacks(operator.callbacks)
    try:
        what = submit_arguments(operator, context)
        fallbacks = fallbacks_of(operator, what)
    except ConfigurationError as error:
        raise AirflowFailException(in_words_of_operator(error.message)) from None
    git_conn_id = operator.git_conn_id
    if git_conn_id and operator.repo_dir is None and not what["configuration"].repos:
        git_conn_id = None
        operator.log.warning(
            "git_conn_id: expected repo_dir, or repos in the configuration, with it, got neither. "
            "The connection is not used."
        )
    client = hook.client_with_code(
        directory_of(operator, context),
        retry_budget=operator.retry_budget,
        local_repo=operator.local_repo,
        git_conn_id=git_conn_id,
        automatic_tags=automatic_tags(context, operator.owner),
    )
    try:
        # Before anything is submitted, also the input of later steps is checked.
        steps = None if fallbacks is None else _steps_of(client, what, names.run, fallbacks)
    except ConfigurationError as error:
        client.close()
        raise AirflowFailException(in_words_of_operator(error.message)) from None
    quick = min(operator.poll_interval, _QUICK_POLL_SECONDS)
    ledger = ledger_of(operator, context, hook.project) if operator.durable else None
    submission = Submission(
        client=client,
        what=what,
        ref=names.run,
        verify_ports=operator.verify_ports,
        ledger=ledger,
        on_kill_action=operator.on_kill_action,
        poll_interval=operator.poll_interval if hand_over_after is None else quick,
        retry_budget=operator.retry_budget,
        log=operator.log,
        on_active=operator.on_active,
        steps=steps,
    )
    options = TaskRunOptions(
        ref=names.run if resumed is None else resumed.ref,
        poll_interval=submission.poll_interval,
        retry_budget=operator.retry_budget,
        logs=operator.get_logs,
        log_budget_bytes=operator.log_budget_bytes,
        log_timestamps=operator.log_timestamps,
        log_groups=operator.log_groups,
        on_kill_action=operator.on_kill_action,
        hand_over_after=hand_over_after,
        was_ended=partial(was_ended, context["ti"]),
        next_try_follows=partial(_next_try_follows, operator, context),
        why_kept=partial(_why_kept, operator, context, ledger),
        ledger=ledger,
        on_submitted=partial(operator.announce, context),
        is_ready=operator.readiness(context),
        secrets=(hook.token, *operator.secret_texts()),
        report_limits=report_limits(operator.max_report_bytes, operator.max_reports_per_second),
        push_reports=partial(push_reports, context["ti"], log=operator.log),
        new_notifier=partial(new_notifier, callbacks, context["ti"], operator.log),
        ladder=None if steps is None else submission,
        resumed=None if resumed is None else resumed.shown,
        deadline=None if resumed is None else resumed.deadline,
    )
    for secret in options.secrets:
        # What this process's environment filled in was in no field.
        mask_secret(secret)
    obtain = submission.obtain if resumed is None else submission.obtain_next
    return TaskRun(obtain, client, options, operator.log)


def _steps_of(client: Client, what: Mapping[str, Any], ref: RunRef, fallbacks: Fallbacks) -> Steps:
    from dstack_core.integration import Attempt, Steps

    options = {name: value for name, value in what.items() if name != "configuration"}
    return Steps(client, what["configuration"], Attempt(ref), fallbacks, options)


def defer(
    operator: DstackRunOperator, task_run: TaskRun, context: Context, was_killed: Callable[[], bool]
) -> NoReturn:
    """Defer the task until its run has ended.

    Raises ``DstackRunInterrupted`` when there is no run, or the task was ended: Airflow would refuse the
    deferral then, and the process would end without stopping the run.
    """
    from airflow_provider_dstack._trigger_relay import save
    from dstack_core import clock

    if task_run.progress is None:
        raise DstackRunInterrupted(f"The task was ended before run {task_run.ref.name} was submitted.")
    deadline = task_run.options.deadline
    if deadline is None and operator.execution_timeout is not None:
        # Airflow itself does not enforce execution_timeout while a task is deferred.
        started = context["ti"].start_date.timestamp()
        if clock.is_virtual():
            # Airflow's times are real.
            started += clock.epoch() - time.time()
        deadline = started + operator.execution_timeout.total_seconds()
    trigger = operator.trigger_type()(
        dstack_conn_id=operator.dstack_conn_id,
        project_name=task_run.project,
        run_name=task_run.ref.name,
        marker=task_run.ref.marker,
        progress=task_run.reports.without_secrets(task_run.progress.to_dict()),
        **task_run.relay.state(),
        reported=task_run.reports.state(),
        poll_interval=operator.poll_interval,
        retry_budget=operator.retry_budget,
        deadline=deadline,
        not_before=clock.epoch() + SETTLE_SECONDS,
        get_logs=operator.get_logs,
        log_budget_bytes=operator.log_budget_bytes,
        log_timestamps=operator.log_timestamps,
        log_groups=operator.log_groups,
        relay_log_again=operator.relay_log_again,
        on_kill_action=operator.on_kill_action,
        max_report_bytes=operator.max_report_bytes,
        max_reports_per_second=operator.max_reports_per_second,
        # As checked when the DAG was parsed: each is the path of a class.
        callbacks=cast("list[str]", operator.callbacks or []),
        mask_env=operator.mask_env,
        secret_names=operator.secret_names(),
        synced_sources=operator.synced_sources or {},
        steps=_steps_state(task_run, deadline),
    )
    push_reports(context["ti"], task_run.reports.changes(), task_run.reports, operator.log)
    with suppress(Exception):
        # Airflow complains about an XCom that is read before it was ever written.
        state = {"progress": trigger.progress, **task_run.relay.state(), "reported": trigger.reported}
        save(context["ti"], trigger.marker, state)
    left = None if deadline is None else max(0.0, deadline - clock.epoch()) + BACKSTOP_SECONDS
    # The last check: what happens between this and Airflow's answer goes unnoticed.
    if was_killed() or was_ended(context["ti"]):
        raise DstackRunInterrupted(f"The task was ended while run {task_run.ref.name} was handed over.")
    operator.defer(
        trigger=trigger,
        method_name="execute_complete",
        timeout=None if left is None else timedelta(seconds=left),
    )
    raise RuntimeError("the task was not deferred")


def _steps_state(task_run: TaskRun, deadline: float | None) -> dict[str, Any] | None:
    """Return what the resumed task needs to know of the steps so far, as values that JSON has."""
    from dataclasses import asdict

    ladder = task_run.options.ladder
    if ladder is None or ladder.steps is None:
        return None
    steps = ladder.steps
    first = asdict(steps.first)
    return {"first": first, "number": steps.number, "deadline": deadline, **steps.sums.to_dict()}


def fallbacks_of(operator: DstackRunOperator, what: Mapping[str, Any] | None = None) -> Fallbacks | None:
    """Return the fallbacks of a task, None without any. Raises ``ConfigurationError``.

    With ``what``, the arguments of step 1, what the later steps replace of them is checked.
    """
    from airflow_provider_dstack._fallbacks import read_fallbacks
    from dstack_core.integration import check_ends, refuse_service

    fallbacks = read_fallbacks(operator.fallbacks, operator.fallback_on_exit)
    if fallbacks is None or what is None:
        return fallbacks
    refuse_service(what["configuration"])
    for own in fallbacks.options:
        if "max_duration" in own:
            check_ends(what["configuration"], own["max_duration"], what["profile"])
    return fallbacks


def submit_arguments(operator: DstackRunOperator, context: Context) -> dict[str, Any]:
    """Return what ``runs.plan`` and ``runs.submit`` both take. Raises ``ConfigurationError``."""
    from airflow_provider_dstack._group_fleet import on_fleet_of_group
    from airflow_provider_dstack._parameters import (
        RENAMED,
        check_masked,
        read_backends,
        read_configuration,
        read_duration,
        read_price,
        with_local_paths,
    )
    from dstack_core import SubmitOptions
    from dstack_core.integration import Hold, check_ends

    folder = operator.configuration_folder or beside_dag(".", context)
    configuration = with_local_paths(read_configuration(operator.configuration), folder)
    # Each option is a field of the operator.
    given = {name: getattr(operator, RENAMED.get(name, name)) for name in SubmitOptions.__optional_keys__}
    given["profile"] = profile_of(operator, context)
    if not given["profile"].fleets:
        configuration = on_fleet_of_group(operator, context, configuration)
    given["max_duration"] = read_duration(given["max_duration"])
    # A run that skips the task has not failed.
    hold = read_duration(given["debug_on_failure"])
    given["debug_on_failure"] = Hold(hold, operator.skip_statuses) if operator.skip_statuses else hold
    if isinstance(given["survive"], str):
        given["survive"] = read_duration(given["survive"])
    given["max_price"] = read_price(given["max_price"])
    given["max_cost"] = read_price(given["max_cost"])
    given["backends"] = read_backends(given["backends"])
    check_ends(configuration, given["max_duration"], given["profile"])
    check_masked(operator, configuration, given["env"])
    given["env"] = _with_parents(operator, context, configuration, given["env"])
    return {"configuration": configuration, **given}


def _with_parents(
    operator: DstackRunOperator, context: Context, configuration: Configuration, env: Any
) -> Any:
    """Return ``env`` with what makes the task the parent of what the run traces and reports; may be None.

    Not for a service that an update leaves running: other variables would restart it.
    """
    from dstack_core.integration import trace_env

    if operator.on_active == "update":
        return env
    parents = {**lineage_env(context.get("ti"), operator.log), **trace_env()}
    own = {item.partition("=")[0] for item in configuration.env or ()}
    parents = {name: value for name, value in parents.items() if name not in own}
    return {**parents, **(env or {})} if parents else env


def profile_of(operator: DstackRunOperator, context: Context) -> Profile:
    """Return the profile that is named, else the default one of ``profiles_file`` or ``repo_dir``.

    Neither the worker's home nor its ``DSTACK_PROFILE`` counts. Raises ``ConfigurationError``.
    """
    from dstack_core import ConfigurationError, Profile, load_profile

    profile, file = operator.profile, operator.profiles_file
    if isinstance(profile, Profile):
        return profile
    folder = directory_of(operator, context)
    if profile and file is None and folder is None:
        raise ConfigurationError(
            f"profile: expected profiles_file or repo_dir with profile {profile!r}, got neither. "
            "Set profiles_file to the path of a profiles.yml, or repo_dir to a directory with "
            ".dstack/profiles.yml."
        )
    try:
        found = load_profile(profile or None, folder, file=beside_dag(file, context), home=False)
    except ConfigurationError as error:
        if file is None or not error.message.startswith("profiles: "):
            raise
        raise ConfigurationError(f"profiles_file: {error.message.removeprefix('profiles: ')}") from None
    if found.model_fields_set:
        operator.log.info("Profile %s applies.", found.name)
    return found


def names_of(operator: DstackRunOperator, context: Context) -> TaskNames:
    """Return the names of a task instance's runs."""
    # A service that is updated outlives its task also in the eyes of the reaper.
    keep = operator.on_kill_action == "keep" or operator.on_active == "update"
    return TaskNames.of(context, operator.run_name, operator.retries or 0, keep=keep)


def ledger_of(operator: DstackRunOperator, context: Context, project: str) -> Ledger:
    """Return the ledger of a task instance's run in ``project``."""
    from airflow_provider_dstack._previous_try import Ledger

    return Ledger(names_of(operator, context), project, task_state_store(context), operator.log)


def run_behind(operator: DstackRunOperator, context: Context) -> RunRef:
    """Return the run of this try, which may be one that was taken over from the previous try."""
    names = names_of(operator, context)
    if not operator.durable:
        return names.run
    record = ledger_of(operator, context, operator.hook().project).read()
    return names.run if record is None else record.run


def directory_of(operator: DstackRunOperator, context: Context) -> Path | None:
    """Return ``repo_dir``; a relative one is in the DAG's folder, as the path of a configuration is."""
    return beside_dag(operator.repo_dir, context)


def beside_dag(given: str | os.PathLike[str] | None, context: Context) -> Path | None:
    """Return a path of this machine; a relative one is in the DAG's folder."""
    if given is None:
        return None
    path = Path(os.fspath(given)).expanduser()
    folder = getattr(context.get("dag"), "folder", "")
    return path if path.is_absolute() or not folder else Path(folder) / path


def leaves_run_to_next_try(operator: DstackRunOperator, context: Context, error: BaseException) -> bool:
    """Return whether the task's next try takes its run over after ``error``."""
    from airflow_provider_dstack._previous_try import will_be_retried

    return operator.durable and will_be_retried(context, error)


def _next_try_follows(operator: DstackRunOperator, context: Context, error: BaseException) -> bool:
    from airflow_provider_dstack._outcome import as_airflow_error

    return leaves_run_to_next_try(operator, context, as_airflow_error(error, submitted=True))


def _why_kept(operator: DstackRunOperator, context: Context, ledger: Ledger | None) -> str | None:
    from airflow_provider_dstack._kill_reason import KillReason, kill_reason
    from airflow_provider_dstack._previous_try import will_be_retried
    from airflow_provider_dstack.errors import DstackRunInterrupted

    reason = kill_reason(partial(task_state, context["ti"]))
    next_try = will_be_retried(context, DstackRunInterrupted("the task's process was ended"))
    # Airflow opens the record to the current try alone, and the new one may already be running.
    if reason.kind == "worker_leaving" and not next_try and ledger is not None and ledger.is_closed():
        reason = KillReason("replaced", "it no longer knows this one")
    return reason.why_kept(durable=operator.durable, next_try=next_try)
