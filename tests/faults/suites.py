"""The tests beside the matrix that docs/reliability.md shows, and the table that each belongs to.

``make test-faults`` runs them with pytest, each in its environment. Append a ``Suite`` for another table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Environment = Literal["core", "airflow", "prefect", "prefect-runners"]


@dataclass(frozen=True)
class Row:
    """A row of a table: what is done, to which host, and the tests that do it (files or node ids of pytest).

    A property that a test records (``record_property``) is shown in the row.
    """

    what: str
    host: str
    environment: Environment
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """A table: its heading, the text above it (what "held" means), and its rows."""

    title: str
    text: str
    rows: tuple[Row, ...]

    def tests(self, environment: str) -> list[str]:
        """Return the tests of an environment, each once."""
        tests = [test for row in self.rows if row.environment == environment for test in row.tests]
        return list(dict.fromkeys(tests))


def _airflow(what: str, host: str, *tests: str) -> Row:
    return Row(what, host, "airflow", tuple(f"tests/provider_airflow/{test}" for test in tests))


def _prefect(what: str, host: str, *tests: str) -> Row:
    return Row(what, host, "prefect", tuple(f"tests/provider_prefect/{test}" for test in tests))


_WORKER, _DEFERRED = "Airflow task on a worker", "Airflow task, deferred"
_FLOW, _MACHINE = "Prefect flow", "Prefect worker of dstack machines"

KILLS = Suite(
    "Processes that are killed",
    "These tests use real processes of Airflow (API server, scheduler, executor, triggerer) and of Prefect (server, worker, runner).\n"
    "Held means: the server has one run, and it is not stopped if another process continues it. The next try, or the process that\n"
    "takes over, logs every line from the right position, none twice, and reports the right end.",
    (
        _airflow(
            "kill -9 while the submission is under way, then the retry",
            _WORKER,
            "test_kill_matrix.py::test_a_kill_between_the_submission_and_its_reply_makes_no_second_run",
            "test_durable.py::test_a_submission_under_way_when_its_worker_was_lost_makes_no_second_run",
        ),
        _airflow(
            "kill -9 while the run is followed, then the retry",
            _WORKER,
            "test_kill_matrix.py::test_a_retry_takes_over_the_run_of_a_killed_task_process",
            "test_real_dstack_matrix.py::test_a_retry_takes_over_the_run_of_a_killed_worker_on_a_real_server",
        ),
        _airflow(
            "kill -9, and the run ends before the retry",
            _WORKER,
            "test_kill_matrix.py::test_a_retry_takes_the_result_of_a_run_whose_node_was_lost",
            "test_durable.py::test_a_retry_takes_the_result_of_a_run_that_succeeded_meanwhile",
        ),
        _airflow(
            "SIGTERM to the worker, with and without a try left",
            _WORKER,
            "test_kill_matrix.py::test_a_worker_shutdown_leaves_the_run_to_the_next_try",
            "test_kill_matrix.py::test_a_worker_shutdown_on_the_last_try_stops_the_run",
        ),
        _airflow(
            "the triggerer is restarted",
            _DEFERRED,
            "test_deferred_matrix.py::test_a_restarted_triggerer_stops_nothing_and_repeats_nothing",
        ),
        _airflow(
            "kill -9 of the triggerer, which is started again",
            _DEFERRED,
            "test_deferred_matrix.py::test_a_killed_triggerer_stops_nothing_and_repeats_nothing",
            "test_deferred_matrix.py::test_a_crash_of_the_process_that_runs_the_triggers_stops_nothing",
        ),
        _airflow(
            "the triggerer hangs, another takes over",
            _DEFERRED,
            "test_deferred_matrix.py::test_a_take_over_stops_nothing_and_repeats_nothing",
        ),
        _prefect(
            "kill -9 while the run is followed, then the flow run is executed again",
            _FLOW,
            "test_processes.py::test_a_run_that_outlives_its_flow_is_followed_again",
        ),
        _prefect(
            "kill -9, and the run ends before the flow run is executed again",
            _FLOW,
            "test_processes.py::test_a_run_that_ended_after_its_flow_died_is_not_paid_twice",
        ),
        _prefect(
            "kill -9, and no process takes over",
            _FLOW,
            "test_processes.py::test_the_hook_stops_the_run_of_a_killed_flow",
            "test_process_worker.py::test_a_killed_flow_leaves_nothing_running",
        ),
        _prefect(
            "connections to Prefect's server are cut while mapped tasks run",
            _FLOW,
            "test_two_servers.py::test_connections_to_prefect_that_are_cut_leave_one_run_for_each_task",
        ),
        _prefect(
            "kill -9 before it has submitted the machine",
            _MACHINE,
            "test_take_over.py::test_a_flow_run_that_a_killed_worker_did_not_submit_gets_its_machine",
        ),
        _prefect(
            "kill -9 while it watches the machine; it is started again, or another worker takes over",
            _MACHINE,
            "test_take_over.py::test_a_killed_worker_started_again_watches_the_same_machine",
            "test_take_over.py::test_one_of_two_other_workers_continues_for_a_killed_one",
        ),
        _prefect(
            "kill -9, then a cancellation",
            _MACHINE,
            "test_take_over.py::test_a_cancellation_after_the_worker_was_killed_is_carried_out",
            "test_take_over.py::test_a_cancellation_without_a_worker_is_carried_out_by_the_next_one",
        ),
    ),
)


def _core(what: str, host: str, *tests: str) -> Row:
    return Row(what, host, "core", tuple(f"tests/faults/{test}" for test in tests))


_CLIENTS = "clients, sync, async and shared"

LOAD = Suite(
    "Load and endurance",
    "On the embedded server. Held means: every run's lines are complete and in order, and no file descriptor, thread, process or\n"
    "temporary file is left over.",
    (
        _core(
            "100 threads or tasks share a client: one run each, or one run for all",
            _CLIENTS,
            "test_many_at_once.py",
        ),
        _core("1,000 runs through one process", _CLIENTS, "test_endurance.py"),
        _core("10 MB of log a second", _CLIENTS, "test_loud.py"),
        _airflow("200 executions in one process", "Airflow operator, sync and deferred", "test_endurance.py"),
        _prefect("100 tasks in one process", "Prefect task, sync and async", "test_endurance.py"),
    ),
)

ODDITIES = Suite(
    "Odd output, odd replies, hostile hosts",
    "Held means: lines of 1 MiB, lines without an end, and lines with NUL, escape sequences or broken UTF-8 arrive and do no harm. Whatever\n"
    "a server or a container sends, the library raises one error, promptly, without a secret in it and with bounded memory use.",
    (
        _core("odd lines", "run.follow()", "test_hostile.py::test_lines_of_any_kind_arrive"),
        _airflow("odd lines", "Airflow operator, sync and deferred", "test_odd_output.py"),
        _prefect("odd lines", "Prefect task, sync and async", "test_logs.py"),
        _core("generated replies and configurations", "client", "test_fuzz.py"),
        _core("hostile servers", "client, sync and async", "test_hostile.py", "test_hostile_replies.py"),
        _core("hostile SSH daemons and containers", "run.attach()", "test_hostile_hosts.py"),
        _airflow("secrets", "Airflow operator", "test_secrets.py"),
        _prefect("secrets", "Prefect task", "test_secrets.py", "test_credentials.py"),
    ),
)

REPORTS = Suite(
    "What a run reports",
    "Messages in the log of a run (results, metrics), while the process that follows it is killed. Held means: each message is delivered\n"
    "once and in order, the last value of each metric and the result are those of the run, and no message is shown as a log line.\n"
    "What a triggerer received and had not saved when it was killed is delivered to the next one, whose saved state lacks it.",
    (
        Row(
            "kill -9 of the process that follows, three times; another continues from its last position",
            "client, on the embedded server and a real one",
            "core",
            ("tests/contract/test_reports.py::test_messages_are_delivered_once_through_kills",),
        ),
        Row(
            "a position after each message and line, continued with pages that are cut elsewhere",
            "clients, sync and async",
            "core",
            ("tests/core/test_reports.py::test_every_event_is_a_place_to_continue",),
        ),
        _airflow(
            "kill -9 of the task's process, then the retry",
            _WORKER,
            "test_kill_matrix.py::test_a_retry_takes_over_the_run_of_a_killed_task_process",
        ),
        _airflow(
            "kill -9 of the triggerer; another takes over",
            _DEFERRED,
            "test_deferred_matrix.py::test_a_killed_triggerer_stops_nothing_and_repeats_nothing",
            "test_deferred_matrix.py::test_a_take_over_stops_nothing_and_repeats_nothing",
        ),
        _airflow(
            "100 messages a second for a minute on a real server, kill -9 of the task's process, then the retry",
            _WORKER,
            "test_real_report_kills.py::test_a_retry_keeps_each_message_of_a_busy_run_of_a_killed_task_once",
        ),
        _airflow(
            "100 messages a second for a minute on a real server, kill -9 of the triggerer; another takes over",
            _DEFERRED,
            "test_real_report_kills.py::test_a_triggerer_keeps_each_message_of_a_busy_run_of_a_killed_one_once",
        ),
        _prefect(
            "the flow run is retried, or cancelled",
            _FLOW,
            "test_reports.py::test_a_retried_flow_has_the_same_result_and_no_further_artifacts_or_assets",
            "test_reports.py::test_what_a_cancelled_run_reports_at_its_end_is_shown",
        ),
    ),
)


HOLDS = Suite(
    "A run that is held after a failure",
    "A run with `debug_on_failure` whose commands have failed, while processes die, or while it is stopped. Held means: the run counts as\n"
    "failed at once, with the status of its commands; the container stays until the time of the hold or a stop, and no longer.",
    (
        Row(
            "kill -9 of the process that follows; another continues from its position",
            "client, on the embedded server and a real one",
            "core",
            ("tests/contract/test_hold.py::test_a_follower_that_is_killed_during_the_hold_changes_nothing",),
        ),
        Row(
            "a stop; the end of the time, without a process that watches; the end of `max_duration`",
            "client, on the embedded server and a real one",
            "core",
            (
                "tests/contract/test_hold.py::test_a_stop_ends_the_hold_at_once",
                "tests/contract/test_hold.py::test_the_hold_ends_by_itself_without_a_watcher",
                "tests/contract/test_hold.py::test_the_limit_of_the_duration_also_limits_the_hold",
            ),
        ),
        Row(
            "one of two nodes fails and is entered by the command that is shown; the other one ends with it",
            "client, on the embedded server and a real one",
            "core",
            (
                "tests/contract/test_hold_entry.py::test_a_failed_node_of_two_is_entered_and_its_end_is_that_of_all",
            ),
        ),
        Row(
            "each reply takes 1 s",
            "clients, sync and async",
            "core",
            ("tests/local/test_held_runs.py",),
        ),
        Row(
            "SIGINT, SIGTERM and SIGHUP to the shell, during the hold and before it",
            "sh, bash and dash",
            "core",
            (
                "tests/core/test_hold.py::test_a_signal_ends_the_hold_at_once",
                "tests/core/test_hold.py::test_commands_that_a_signal_has_ended_are_not_held",
            ),
        ),
        _airflow(
            "kill -9 of the task's process during the hold, then the retry; the hold ends by itself",
            _WORKER,
            "test_held_kills.py::test_a_worker_that_is_killed_during_a_hold_leaves_nothing",
            "test_held_kills.py::test_a_worker_that_is_killed_during_a_hold_leaves_nothing_on_a_real_server",
        ),
        _airflow(
            "kill -9 of the triggerer during the hold; the next one continues; the hold ends by itself",
            _DEFERRED,
            "test_held_kills.py::test_a_triggerer_that_is_killed_during_a_hold_leaves_nothing",
        ),
        _airflow(
            "the DAG run is marked failed; the hold is kept",
            _WORKER,
            "test_held_kills.py::test_a_dag_run_that_is_marked_failed_during_a_hold_keeps_it",
        ),
        _airflow(
            "each reply takes 1 s",
            "Airflow operator, sync and deferred",
            "test_held_runs.py::test_the_task_fails_with_the_line_to_enter_on_a_slow_server",
        ),
        _prefect(
            "kill -9 of the flow's process during the hold, then another execution; the hold ends by itself",
            _FLOW,
            "test_held_kills.py::test_a_flow_that_is_killed_during_a_hold_leaves_nothing",
        ),
        _prefect(
            "the flow run is cancelled; the hold ends",
            _FLOW,
            "test_held_kills.py::test_a_flow_run_that_is_cancelled_during_a_hold_ends_it",
        ),
        _prefect(
            "kill -9 of the worker during the hold; another one continues; the hold ends by itself",
            _MACHINE,
            "test_held_kills.py::test_a_worker_that_is_killed_during_a_hold_leaves_nothing",
        ),
        _prefect(
            "each reply takes 1 s",
            "Prefect task, sync and async",
            "test_held_runs.py::test_a_run_is_held_on_a_slow_server",
        ),
    ),
)


CALLBACKS = Suite(
    "Callbacks",
    "User code that is called while a run is followed, and processes that are killed meanwhile. Held means: `on_ended` is called once by the\n"
    "process that has the outcome, `on_submitted` once by each process that submits the run or takes it over, and behind a position that a\n"
    "triggerer has saved nothing is called again. A callback that hangs delays neither the log nor a stop.",
    (
        _airflow(
            "kill -9 of the task's process, then the retry; the run ends before the retry",
            _WORKER,
            "test_kill_matrix.py::test_a_retry_takes_over_the_run_of_a_killed_task_process",
            "test_kill_matrix.py::test_a_retry_takes_the_result_of_a_run_whose_node_was_lost",
        ),
        _airflow(
            "the triggerer or its process of triggers is killed, or the triggerer is restarted",
            _DEFERRED,
            "test_deferred_matrix.py::test_a_restarted_triggerer_stops_nothing_and_repeats_nothing",
            "test_deferred_matrix.py::test_a_killed_triggerer_stops_nothing_and_repeats_nothing",
            "test_deferred_matrix.py::test_a_crash_of_the_process_that_runs_the_triggers_stops_nothing",
        ),
        _airflow(
            "another trigger takes over; or another triggerer, since the first hangs",
            _DEFERRED,
            "test_callbacks.py::test_a_take_over_calls_nothing_again_that_was_saved",
            "test_deferred_matrix.py::test_a_take_over_stops_nothing_and_repeats_nothing",
        ),
        _prefect(
            "kill -9, then the flow run is executed again; the run ends before or after that",
            _FLOW,
            "test_processes.py::test_a_run_that_outlives_its_flow_is_followed_again",
            "test_processes.py::test_a_run_that_ended_after_its_flow_died_is_not_paid_twice",
        ),
        _prefect(
            "kill -9 while it watches the machine; another worker takes over",
            _MACHINE,
            "test_take_over.py::test_one_of_two_other_workers_continues_for_a_killed_one",
        ),
        _airflow(
            "a callback hangs",
            "Airflow task, on a worker and deferred",
            "test_callbacks.py::test_a_hanging_callback_delays_neither_the_log_nor_a_kill",
            "test_callbacks.py::test_a_hanging_callback_does_not_delay_the_stop_of_a_run_whose_task_fails",
            "test_callbacks.py::test_a_trigger_whose_callback_hangs_relays_the_log_and_is_cancelled_at_once",
        ),
    ),
)

_FLEET = "Airflow tasks on Celery workers"
_FLEET_DEFERRED = "Airflow tasks on two triggerers"
_POD = "Airflow task in the processes of a pod"

FLEET = Suite(
    "A fleet of Celery workers",
    "Airflow with CeleryExecutor: two workers, two schedulers, two triggerers, one API server, Redis and Postgres. Held means: each task has\n"
    "one run, none is submitted twice, none is stopped that should keep running, and its log has every line in order. Only the log of a\n"
    "task whose triggerer was lost has lines twice.",
    (
        _airflow(
            "6, 40 mapped tasks on both workers",
            _FLEET,
            "test_celery.py::test_mapped_tasks_on_two_workers_and_two_triggerers",
            "test_celery_many.py::test_many_mapped_tasks_have_one_run_each_and_every_line_once[sync_40]",
        ),
        _airflow(
            "100 mapped tasks at once",
            _FLEET_DEFERRED,
            "test_celery_many.py::test_many_mapped_tasks_have_one_run_each_and_every_line_once[deferred_100]",
        ),
        _airflow(
            "kill -9 of a worker, with a try left; on the last try, then the reaper",
            _FLEET,
            "test_celery.py::test_a_lost_worker_leaves_the_run_to_the_next_try",
            "test_celery_workers.py::test_the_reaper_stops_what_a_lost_worker_leaves_on_the_last_try",
        ),
        _airflow(
            "SIGTERM to a worker's main process",
            _FLEET,
            "test_celery_workers.py::test_a_warm_shutdown_of_a_worker_waits_for_its_tasks",
        ),
        _airflow(
            "SIGQUIT to a worker, SIGTERM to all its processes; with and without a try left",
            _FLEET,
            "test_celery_workers.py::test_a_shutdown_of_a_worker_leaves_the_run_to_the_next_try",
            "test_celery_workers.py::test_a_shutdown_of_a_worker_on_the_last_try_stops_the_run",
        ),
        _airflow(
            "kill -9 of one of two triggerers, with 50 deferred tasks",
            _FLEET_DEFERRED,
            "test_celery_triggerers.py::test_a_lost_triggerer_is_replaced_by_the_other_one",
        ),
        _airflow(
            "SIGSTOP of one of two triggerers for longer than its heartbeat",
            _FLEET_DEFERRED,
            "test_celery_triggerers.py::test_a_triggerer_that_hangs_and_comes_back_stops_nothing",
        ),
        _airflow(
            "some of 48 active tasks are marked failed or success, or cleared",
            "Airflow tasks on both",
            "test_celery_ends.py",
        ),
        _airflow(
            "API server, Redis, Postgres, one or both schedulers away for 20 s and 100 s",
            "Airflow tasks on both",
            "test_celery_outages.py",
        ),
        _airflow(
            "dstack server away for three minutes",
            "Airflow tasks on both",
            "test_celery_timeouts.py::test_runs_are_taken_up_again_after_three_minutes_without_the_server",
        ),
        _airflow(
            "`execution_timeout`, each reply of the dstack server takes 2.5 s",
            "Airflow tasks on both",
            "test_celery_timeouts.py::test_execution_timeout_stops_the_runs_of_a_slow_server",
        ),
        _airflow(
            "the broker delivers the message of a running task again",
            _FLEET,
            "test_celery_redelivery.py",
        ),
        _airflow(
            "SIGTERM to a pod, as a kubelet and as dumb-init send it; with and without a try left; on a slow server",
            _POD,
            "test_pods.py::test_a_pod_that_is_ended_on_the_last_try_stops_its_run_within_its_grace_period",
            "test_pods.py::test_a_pod_that_is_ended_stops_its_run_on_a_slow_server",
            "test_pods.py::test_a_pod_that_is_lost_leaves_its_run_to_the_next_try[end]",
        ),
        _airflow(
            "kill -9 of a pod, with a try left; on the last try, then the reaper",
            _POD,
            "test_pods.py::test_a_pod_that_is_lost_leaves_its_run_to_the_next_try[kill]",
            "test_pods.py::test_the_reaper_stops_what_a_killed_pod_leaves_on_the_last_try",
        ),
    ),
)


_RUNNERS = "tests/provider_prefect/test_runners.py"


def _runner(what: str, test: str) -> Row:
    tests = tuple(f"{_RUNNERS}::{test}[{name}]" for name in ("dask", "ray"))
    return Row(what, "DaskTaskRunner and RayTaskRunner", "prefect-runners", tests)


RUNNERS = Suite(
    "Task runners of Dask and Ray",
    "Real Dask and Ray workers, four each, in flows that `serve()` runs. Held means: each task has one run, none is submitted twice or after\n"
    "a cancellation, each line is in Prefect's log under its own task run, in order and once, also those of a killed worker's task, and nothing\n"
    "keeps running in the end.",
    (
        _runner("50 mapped tasks", "test_each_of_fifty_mapped_tasks_has_one_run_and_its_own_log"),
        _runner(
            "the flow run is cancelled while each worker follows a run and others are queued",
            "test_a_cancellation_stops_what_all_workers_run_and_submits_nothing_more",
        ),
        _runner(
            "kill -9 of a worker; its task is repeated on another one",
            "test_the_task_of_a_killed_worker_takes_its_run_over",
        ),
        Row(
            "kill -9 of a worker; queued tasks come before the repeated one, whose run ends meanwhile",
            "RayTaskRunner",
            "prefect-runners",
            (f"{_RUNNERS}::test_a_task_that_ray_repeats_behind_queued_ones_takes_the_end_of_its_run",),
        ),
        _runner(
            "kill -9 of a worker; its task is not repeated; then the reaper",
            "test_the_reaper_stops_what_a_killed_worker_leaves",
        ),
    ),
)

SCALE = Suite(
    "Two Prefect servers on Postgres",
    "Two API processes share a database, behind one address. Held means: each mapped task has one run and ends as Completed, each of its lines\n"
    "is in Prefect's log once; each flow run of the work pool has one machine at most, never more at once than the worker's limit, the\n"
    "cancelled half ends as Cancelled and the other half as Completed, and nothing keeps running in the end.",
    (
        _prefect(
            "kill -9 of one of them while 50 mapped tasks run",
            _FLOW,
            "test_two_servers.py::test_a_killed_api_server_leaves_one_run_for_each_mapped_task[50]",
        ),
        _prefect(
            "100 flow runs of one worker, of which half are cancelled, running or waiting",
            _MACHINE,
            "test_two_servers.py::test_each_of_many_flow_runs_has_one_machine_and_half_of_them_are_cancelled"
            "[100-20-two servers]",
        ),
    ),
)

SUITES = [KILLS, FLEET, RUNNERS, SCALE, REPORTS, HOLDS, CALLBACKS, LOAD, ODDITIES]
