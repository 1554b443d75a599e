"""Find the fleets that tasks created and whose DAG run has ended, and delete them.

A setup deletes its fleet when it fails, and a teardown does when the work is done. What is left is the fleet
of a DAG run whose worker or machine was gone, or that was deleted. Rules, in this order:

1. A fleet without the mark of an Airflow task is left out.
2. Ownership is proven by the start of the DAG run, as for runs. Without that proof the fleet is left, unless
   ``stop_unknown``.
3. A DAG run that has not ended keeps its fleets.
4. A fleet is deleted once the runs that use it have ended: those of ended tasks are stopped before. What
   takes longer than the pass waits is the next pass's.

All questions are asked before the first deletion. Volumes are never deleted: they may hold data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._resource_names import ResourceOwner
from airflow_provider_dstack._resource_verdicts import Action, deletion_failure, judge

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskFacts, TaskInstanceLike
    from dstack_core import Client
    from dstack_core import DstackError as CoreDstackError

# Seconds that one pass waits for the runs that use its fleets, in all. Most stopped jobs end within 10 s; a
# busy server takes its time. A job with a longer ``stop_duration`` is left to the next pass.
IN_USE_SECONDS = 30.0
# With less, a slow reply would look like a run that does not end.
_LEAST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class FleetFinding:
    """One fleet of an Airflow task: whose it is, and what was done about it.

    ``task_instance`` is ``dag/run/task[map_index]``; ``state`` is that of its DAG run, ``"unknown"`` if this
    Airflow has no such DAG run.
    """

    fleet_name: str
    task_instance: str
    state: str
    action: Action
    reason: str


def reap_fleets(
    client: Client,
    ask: Callable[[TaskInstanceLike], TaskFacts | None],
    *,
    dry_run: bool,
    stop_unknown: bool,
    log: Any,
) -> list[FleetFinding]:
    """Delete the fleets whose DAG run has ended, and return what was found.

    Raises dstack's server errors, and ``DstackError`` when Airflow does not answer, in both cases before
    anything is deleted. A fleet that could not be deleted is a finding, not an error.
    """
    from dstack_core import clock

    owned = [
        (fleet.name, fleet.marker, owner)
        for fleet in client.fleets.list()
        if not fleet.is_terminating
        and not fleet.has_ended
        and (owner := ResourceOwner.read(fleet.marker)) is not None
    ]
    found = []
    for name, mark, owner in owned:
        verdict = judge(owner, ask, kind="fleet", stop_unknown=stop_unknown)
        action = verdict.action(dry_run=dry_run)
        found.append((mark, FleetFinding(name, str(owner), verdict.state, action, verdict.reason)))
    end = clock.monotonic() + IN_USE_SECONDS
    findings = [
        _delete(client, mark, finding, end - clock.monotonic()) if finding.action == "deleted" else finding
        for mark, finding in found
    ]
    for finding in findings:
        log.info("%s", describe_fleet(finding))
    return findings


def describe_fleet(finding: FleetFinding) -> str:
    """Return a finding as one line for a person."""
    return (
        f"{finding.action.capitalize()}: fleet {finding.fleet_name} of {finding.task_instance} "
        f"(DAG run {finding.state}): {finding.reason}"
    )


def fleet_failure(findings: Sequence[FleetFinding]) -> str | None:
    """Return one message about the fleets that could not be deleted, None when there are none."""
    failed = [(one.fleet_name, one.reason) for one in findings if one.action == "not deleted"]
    return deletion_failure(failed, "these")


def _delete(client: Client, mark: str | None, finding: FleetFinding, seconds: float) -> FleetFinding:
    """Delete a fleet; wait at most so long for the end of runs that use it."""
    from dstack_core import DstackError as CoreError
    from dstack_core import RequestRejectedError, ResourceNameTakenError, WaitTimeoutError

    in_use = replace(finding, action="left", reason="runs still use it; the next pass deletes it")
    try:
        if seconds > _LEAST_SECONDS:
            client.fleets.delete(finding.fleet_name, marker=mark, wait_for_runs=True, timeout=seconds)
        else:
            client.fleets.delete(finding.fleet_name, marker=mark)
    except ResourceNameTakenError:
        return replace(finding, action="left", reason="it was deleted meanwhile")
    except WaitTimeoutError:
        return in_use
    except RequestRejectedError as error:
        return in_use if "in use" in error.message else _not_deleted(finding, error)
    except CoreError as error:
        return _not_deleted(finding, error)
    return finding


def _not_deleted(finding: FleetFinding, error: CoreDstackError) -> FleetFinding:
    return replace(finding, action="not deleted", reason=error.message)
