"""What ``airflow dstack doctor`` checks of Airflow: whether nothing can be left running, and no line lost.

The problem: a task stops its run itself, in the few seconds that Airflow leaves it; what no process is left
to stop, the reaper stops. The log of a deferred task is written by a triggerer and read by the API server.
Each of these needs something of Airflow's components and configuration that no task can see.

The idea: questions to Airflow's public health page, configuration and database, as its own commands ask them,
one finding for each. Nothing is changed. Run it where the scheduler or the API server runs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from importlib.metadata import entry_points
from typing import Any

import requests
from sqlalchemy.exc import SQLAlchemyError

from airflow_provider_dstack._compat import DatabaseFacts, api_address, database_facts, host_name, server_conf
from dstack_core.integration import Finding

# Seconds: a person waits for the answers.
_TIMEOUT = 10.0
# The page of this provider's plugin, which needs no login.
_PLUGIN_PAGE = "/dstack-utilization/"
_DISTRIBUTION = "airflow-provider-dstack"
# Seconds that a task's process has for its stop, of the five that Airflow gives it.
_STOP_SECONDS = 4
# Seconds for which the log can still confirm the stop: two replies within the four (airflow-guarantees.md).
_CONFIRMED_REPLY = 1.9
_REAPER_DOCS = "a DAG with a DstackReapOperator every 15 minutes (see its docstring)"


def airflow_findings(reply_seconds: float | None = None) -> Iterator[Finding]:
    """Yield what was found, a finding for each check; raises nothing that Airflow causes.

    Args:
        reply_seconds: How long the dstack server took for a reply; None: unknown, so it is not judged.
    """
    yield from _provider()
    health = yield from _health()
    yield from _kill_grace(reply_seconds)
    try:
        facts = database_facts()
    except SQLAlchemyError as error:
        yield Finding(
            "Airflow database",
            "warning",
            f"It does not answer ({type(error).__name__}), so reaper and triggerers were not checked.",
            "Run this command where Airflow's scheduler or API server runs.",
        )
        return
    yield from _triggerer(health, facts)
    yield from _reaper(facts)
    yield from _deferred_logs(facts)


def _provider() -> Iterator[Finding]:
    registered = [
        each
        for each in entry_points(group="apache_airflow_provider")
        if each.module.startswith("airflow_provider_dstack.")
    ]
    if not registered:
        yield Finding(
            "Airflow provider",
            "error",
            "Airflow does not find this provider: its entry point is not installed.",
            f"Install it as a package in this environment: pip install {_DISTRIBUTION}",
        )
        return
    version = registered[0].dist.version if registered[0].dist else "of unknown version"
    yield Finding("Airflow provider", "ok", f"{_DISTRIBUTION} {version} is registered.")


def _health() -> Generator[Finding, None, dict[str, Any] | None]:
    """Check Airflow by its documented health page. Source: Airflow documentation, "Checking health"."""
    address = api_address()
    try:
        reply = requests.get(f"{address}/api/v2/monitor/health", timeout=_TIMEOUT)
        reply.raise_for_status()
        health: dict[str, Any] = reply.json()
    except (requests.RequestException, ValueError) as error:
        yield Finding(
            "Airflow",
            "warning",
            f"The API server does not answer at {address} ({type(error).__name__}).",
            "Set [api] base_url to its address, and make sure that workers and triggerers reach it: without "
            "it tasks cannot report.",
        )
        return None
    for part, why in (("scheduler", "No task starts."), ("dag_processor", "New DAGs are not read.")):
        status = _status(health, part)
        if status == "healthy":
            yield Finding(f"Airflow {part}", "ok", "It is healthy.")
        else:
            yield Finding(
                f"Airflow {part}",
                "warning",
                f"It is {status or 'not running'}. {why}",
                f"Start it: airflow {part.replace('_', '-')}",
            )
    yield from _plugin(address)
    return health


def _status(health: dict[str, Any], part: str) -> str | None:
    return (health.get(part) or {}).get("status")


def _plugin(address: str) -> Iterator[Finding]:
    try:
        status = requests.get(f"{address}{_PLUGIN_PAGE}", timeout=_TIMEOUT).status_code
    except requests.RequestException:
        # The health page has just answered; a proxy may let only that through.
        return
    if status == 404:
        yield Finding(
            "Airflow plugin",
            "warning",
            "The API server does not have this provider's plugin: tasks have no tab Utilization.",
            f"Run pip install {_DISTRIBUTION} in the API server's environment, and restart it.",
        )
    elif status == 200:
        yield Finding("Airflow plugin", "ok", "The API server has the tab Utilization.")


def _kill_grace(reply_seconds: float | None) -> Iterator[Finding]:
    # Airflow 3 gives five seconds whatever this is; a version that reads it kills earlier if it is lower.
    configured = server_conf().getint("core", "killed_task_cleanup_time", fallback=60)
    if configured <= _STOP_SECONDS:
        yield Finding(
            "Airflow kill grace",
            "warning",
            f"[core] killed_task_cleanup_time is {configured} s; a killed task needs {_STOP_SECONDS} s "
            "to stop its run.",
            "Leave it at its default, 60.",
        )
    elif reply_seconds is not None and reply_seconds > _CONFIRMED_REPLY:
        yield Finding(
            "Airflow kill grace",
            "warning",
            f"The dstack server took {reply_seconds:.1f} s for a reply. A killed task has {_STOP_SECONDS} s: "
            "its stop is sent, but its log does not confirm it.",
            f"Schedule {_REAPER_DOCS}; it stops what was not stopped.",
        )
    elif reply_seconds is not None:
        yield Finding(
            "Airflow kill grace",
            "ok",
            f"A killed task has {_STOP_SECONDS} s to stop its run; a reply takes {reply_seconds:.2f} s.",
        )


def _triggerer(health: dict[str, Any] | None, facts: DatabaseFacts) -> Iterator[Finding]:
    if health is None:
        return
    status = _status(health, "triggerer")
    if status == "healthy":
        yield Finding("Airflow triggerer", "ok", "It is healthy.")
        return
    by_default = server_conf().getboolean("operators", "default_deferrable", fallback=False)
    state = f"It is {status or 'not running'}."
    if facts.deferred or by_default:
        waiting = f" {facts.deferred} deferred dstack tasks wait for it." if facts.deferred else ""
        default = " Tasks are deferrable by default ([operators] default_deferrable)." if by_default else ""
        yield Finding(
            "Airflow triggerer",
            "error",
            f"{state}{waiting}{default} Deferred tasks neither continue nor stop their runs.",
            "Start it: airflow triggerer",
        )
    else:
        yield Finding(
            "Airflow triggerer",
            "warning",
            f"{state} No dstack task is deferred now; with deferrable=True none would continue.",
            "Start it: airflow triggerer",
        )


def _reaper(facts: DatabaseFacts) -> Iterator[Finding]:
    working = [each for each in facts.reapers if each.is_scheduled and not each.is_paused]
    if working:
        names = ", ".join(sorted(each.dag_id for each in working))
        failed = [each.dag_id for each in working if each.last_state == "failed"]
        if failed:
            yield Finding(
                "Airflow reaper",
                "warning",
                f"The last pass of the reaper in DAG {', '.join(failed)} failed.",
                "Read the log of its task: it names the runs that could not be stopped.",
            )
        else:
            yield Finding("Airflow reaper", "ok", f"It is scheduled in DAG {names}.")
        return
    paused = [each.dag_id for each in facts.reapers if each.is_paused]
    if paused:
        yield Finding(
            "Airflow reaper",
            "warning",
            f"Its DAG {', '.join(paused)} is paused: runs that no process is left to stop keep running.",
            f"Run: airflow dags unpause {paused[0]}",
        )
        return
    unscheduled = [each.dag_id for each in facts.reapers]
    found = (
        f"Its DAG {', '.join(unscheduled)} has no schedule"
        if unscheduled
        else "No DAG with a DstackReapOperator has run"
    )
    yield Finding(
        "Airflow reaper",
        "warning",
        f"{found}: runs that no process is left to stop keep running.",
        f"Add {_REAPER_DOCS}, or let cron run this every 15 minutes: airflow dstack reap",
    )


def _deferred_logs(facts: DatabaseFacts) -> Iterator[Finding]:
    conf = server_conf()
    is_remote = conf.getboolean("logging", "remote_logging", fallback=False)
    here = host_name()
    elsewhere = sorted({host for host in facts.triggerer_hosts if host != here})
    if conf.getboolean("dstack", "relay_log_again", fallback=False):
        # The setting of this machine; that of a single task is not seen.
        if facts.triggerer_hosts and not elsewhere and not is_remote:
            yield Finding(
                "Airflow deferred logs",
                "warning",
                "[dstack] relay_log_again is on, and the triggerer runs on this machine: if it shares the "
                "log folder, each line of a deferred task appears twice.",
                "Turn it off: it is for triggerers that do not share the API server's log folder.",
            )
        else:
            yield Finding(
                "Airflow deferred logs",
                "ok",
                "Tasks that resume relay their log again ([dstack] relay_log_again).",
            )
        return
    if is_remote:
        if conf.get("logging", "remote_base_log_folder", fallback=""):
            yield Finding(
                "Airflow deferred logs", "ok", "Remote logging is on, so each component finds them."
            )
        else:
            yield Finding(
                "Airflow deferred logs",
                "warning",
                "Remote logging is on, but [logging] remote_base_log_folder is empty.",
                "Set it to the address of the store, such as s3://bucket/logs.",
            )
        return
    if not facts.triggerer_hosts:
        yield Finding("Airflow deferred logs", "skipped", "No triggerer runs, so there are none.")
    elif not elsewhere:
        yield Finding("Airflow deferred logs", "ok", "The triggerer runs on this machine.")
    else:
        folder = conf.get("logging", "base_log_folder", fallback="")
        yield Finding(
            "Airflow deferred logs",
            "warning",
            f"Remote logging is off, and triggerers run on {', '.join(elsewhere)}, not on {here}. The lines "
            "of deferred tasks vanish with their end unless the API server sees the triggerers' folder.",
            f"Share {folder} between triggerers and API server, turn on [logging] remote_logging, or set "
            "AIRFLOW__DSTACK__RELAY_LOG_AGAIN=True on the workers.",
        )
