"""Stop the runs and delete the fleets of flow runs that have ended; report ends that nothing else reported.

The last line of defence: it needs nothing of the processes that submitted the runs, only the markers on the
runs, the states in Prefect, and what ``_end_reports`` reads from Prefect's artifacts and events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from prefect_dstack import _end_reports
from prefect_dstack._checks import check_least_seconds, check_switches
from prefect_dstack._judge import UNKNOWN_STATE, Finding, Judge
from prefect_dstack._names import owner_of
from prefect_dstack._orphaned_resources import reap_resources
from prefect_dstack._orphaned_runs import stop_all
from prefect_dstack.credentials import PATIENT_TIMEOUT, CredentialsLike, load, open_client

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from dstack_core import Client, Run

# A pass is repeated by its schedule, so it does not wait long for a server that is down.
_BUDGET = 30.0
_ENDED = "its flow run or task run has ended"
# A real server needs 2 to 20 s to end a run (PROTOCOL 5.4). What needs longer is reported by the next pass.
_END_SECONDS = 60.0
_log = logging.getLogger("prefect_dstack")


def reap(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the runs and delete the fleets of flow runs and task runs that have ended; report how runs ended.

    Left alone are the runs submitted with ``on_crash="keep"`` unless their flow run was cancelled, and those
    that a task still waits for. A task run that stays Running without a process, since its worker of Dask or
    Ray was killed, no longer counts ten minutes after its flow run completed or failed.

    If the process of a plain script is killed, its flow run stays Running, so its runs are left alone until
    the flow run is set to Crashed: by hand, by the API, or by Prefect's "Crash zombie flows" automation.

    Runs that are stopped here are awaited for up to a minute. Their ends are reported in Prefect, and so are
    those of runs that ended earlier without a report: because their flow's process was killed and had no
    hooks, or the server needed longer than any process waited. Each end is reported once.

    Project secrets of ``sync_secrets`` are deleted, and fleets once their runs have ended. A fleet that runs
    use, or whose flow run has a run that is left, is left; one with ``keep=True`` is never touched.

    Args:
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment.
        dry_run: Only return what would be stopped. Default: False.
        min_age: Seconds since the end of the flow run, which stops its runs itself. Default: 60.
        stop_unknown: Also stop the runs of flow runs that this Prefect server does not know: they may be
            another server's. Default: False.

    Returns:
        The fields of ``Finding`` for each run and fleet.

    Raises:
        ConfigurationError: ``min_age`` is not a number of seconds, 0 or more; or a switch is not a bool.
        DstackError: The errors of the dstack server, when runs are listed.
        Exception: What Prefect's client raises.
    """
    from prefect.client.orchestration import get_client

    check_switches(dry_run=dry_run, stop_unknown=stop_unknown)
    check_least_seconds(min_age=min_age)
    findings: dict[str, Finding] = {}
    with (
        open_client(load(credentials), PATIENT_TIMEOUT, retry_budget=_BUDGET) as client,
        get_client(sync_client=True) as api,
    ):
        # A list of runs shows nothing of a project that does not exist, which must not look like an
        # all-clear.
        client.projects.get()
        judge = Judge(api, min_age, stop_unknown)
        active = _active(client.runs.list())
        for run in active:
            if not run.last_status.is_ending:
                findings[run.id] = judge.finding(run)
        if dry_run:
            findings |= reap_resources(client, judge, list(findings.values()), dry_run=True)
            return [asdict(finding) for finding in findings.values()]
        stopped = [run for run in active if run.id in findings and findings[run.id].stopped]
        for run, result in zip(stopped, stop_all(client, stopped, _log, _ENDED), strict=True):
            if not result.is_safe:
                failure = "the server refused" if result.state == "refused" else "could not confirm"
                reason = f"{findings[run.id].reason}; {failure} the stop: {result.error}"
                findings[run.id] = replace(findings[run.id], stopped=False, failed=True, reason=reason)
        of_active = list(findings.values())
        # A run that was just stopped has its finding already.
        for finding in _report_ends(client, api, judge, active, _stopped(findings)):
            findings.setdefault(*finding)
        # Last, when the runs that use them have ended.
        findings |= reap_resources(client, judge, of_active, dry_run=False)
    return [asdict(finding) for finding in findings.values()]


async def areap(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the active runs whose flow run has ended: the async twin of ``reap``, which runs in a thread."""
    return await asyncio.to_thread(
        reap, credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown
    )


@task(cache_policy=NO_CACHE, retries=0)
def reap_runs(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the runs of flow runs that have ended, and report how runs ended; for a flow on a schedule.

    The task of ``prefect_dstack.reaper.reap``, which explains what is left alone. Each finding is logged.

    Args:
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment.
        dry_run: Only return what would be stopped. Default: False.
        min_age: Seconds since the end of the flow run, which stops its runs itself. Default: 60.
        stop_unknown: Also stop the runs of flow runs that this Prefect server does not know: they may be
            another server's. Default: False.

    Returns:
        The fields of ``prefect_dstack.reaper.Finding`` for each run and fleet.

    Raises:
        ConfigurationError: ``min_age`` is not a number of seconds, 0 or more; or a switch is not a bool.
        DstackError: The errors of the dstack server, when runs are listed; or a run could not be stopped.
        Exception: What Prefect's client raises.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import reap_runs


        @flow
        def clean_up() -> None:
            reap_runs("my-credentials", min_age=300)
        ```
    """
    findings = reap(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    _log_findings(findings, dry_run)
    return findings


@task(cache_policy=NO_CACHE, retries=0)
async def areap_runs(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the runs of flow runs that have ended: the async twin of ``reap_runs``.

    Parameters, result and errors are the same.
    """
    findings = await areap(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    _log_findings(findings, dry_run)
    return findings


def _active(runs: Iterable[Run]) -> list[Run]:
    """Return the active runs of flows, tasks and workers."""
    kinds = ("flow_run", "task_run", "worker")
    return [
        run for run in runs if not run.last_status.is_finished and (owner_of(run.marker) or ("",))[0] in kinds
    ]


def _report_ends(
    client: Client, api: SyncPrefectClient, judge: Judge, active: list[Run], stopped: set[str]
) -> list[tuple[str, Finding]]:
    """Report the ends of the runs that were stopped just now, and of those without a report."""
    # A run that has both counts by its artifact, which is brought to 100 %.
    shown = {run.run_id: run for run in _end_reports.unreported(api)}
    shown = {run.run_id: run for run in _end_reports.unreported_stops(api)} | shown
    awaited = [_end_reports.choose_report(shown, run) for run in active if run.id in stopped]
    others = [run for run in shown.values() if judge.has_ended(run.flow_run_id)]
    outcomes = _end_reports.report_ends(client, others, timeout=0.0, logger=_log)
    _end_reports.report_ends(client, awaited, timeout=_END_SECONDS, stopped=stopped, logger=_log)
    found = []
    for outcome in outcomes:
        owner = next(run.flow_run_id for run in others if run.run_id == outcome.run_id)
        state = judge.state("flow_run", owner) if owner else None
        name = UNKNOWN_STATE if state is None else str(state.name)
        reason = f"it {outcome.message}; its end was not reported before"
        found.append(
            (outcome.run_id, Finding(outcome.run_name, outcome.url, f"flow_run/{owner}", name, False, reason))
        )
    return found


def _stopped(findings: Mapping[str, Finding]) -> set[str]:
    """Return the ids of the runs that are going to end because they were stopped."""
    return {run_id for run_id, finding in findings.items() if finding.stopped}


def _log_findings(findings: list[dict[str, Any]], dry_run: bool) -> None:
    """Log the findings. Raises ``DstackError`` when one could not be stopped, so that its task fails."""
    from dstack_core import DstackError

    logger = get_run_logger()
    for found in findings:
        level = logging.ERROR if found["failed"] else logging.INFO
        logger.log(level, "%s", describe(found, dry_run=dry_run))
    logger.info("%s", summary(findings, dry_run=dry_run))
    failed = [found for found in findings if found["failed"]]
    if failed:
        names = ", ".join(map(_with_page, failed))
        what = "runs" if all(found["kind"] == "run" for found in failed) else "runs, fleets or secrets"
        raise DstackError(
            f"Reaping: {len(failed)} {what} could not be stopped. Stop them on their pages: {names}"
        )


def summary(findings: Sequence[Mapping[str, Any]], *, dry_run: bool) -> str:
    """Return the count of findings by action, in one line."""
    if not findings:
        return "No active or unreported run of a Prefect flow or task was found."
    actions = [_action(found, dry_run).lower() for found in findings]
    counts = ", ".join(f"{actions.count(one)} {one}" for one in dict.fromkeys(actions))
    kinds = [found["kind"] for found in findings]
    nouns = " and ".join(
        f"{kinds.count(kind)} {kind}{'' if kinds.count(kind) == 1 else 's'}" for kind in dict.fromkeys(kinds)
    )
    return f"{nouns} of Prefect flows and tasks: {counts}."


def describe(found: Mapping[str, Any], *, dry_run: bool) -> str:
    """Return a finding in one line; with ``dry_run`` nothing was stopped."""
    owner = f"{found['owner']} ({found['state']})"
    action = _action(found, dry_run)
    return f"{action}: {found['kind']} {_with_page(found)} of {owner}: {found['reason']}"


def _with_page(found: Mapping[str, Any]) -> str:
    return f"{found['run_name']} ({found['url']})" if found["url"] else str(found["run_name"])


def _action(found: Mapping[str, Any], dry_run: bool) -> str:
    verb = "stop" if found["kind"] == "run" else "delete"
    did = f"Would {verb}" if dry_run else {"stop": "Stopped", "delete": "Deleted"}[verb]
    failed = {"stop": "Not stopped", "delete": "Not deleted"}[verb]
    return failed if found["failed"] else did if found["stopped"] else "Left"
