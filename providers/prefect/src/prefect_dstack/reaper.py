"""Find and stop the runs of flow runs that are over: what a host that died left running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from prefect_dstack._connect import CredentialsLike, load, open_client
from prefect_dstack._names import outlives_crash, owner_of
from prefect_dstack._stop import is_ending

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

    from dstack_core import Run

_BUDGET = 30.0
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """Tell one active run of this package: whose it is and what was done about it.

    ``owner`` is ``flow_run``, ``task_run`` or ``worker`` and the id of the flow or task run; ``state`` its
    state's name, ``"unknown"`` when this Prefect server has none; ``stopped`` whether the run was asked to
    stop, or would be in a dry run; ``reason`` (str) says why, or why not.
    """

    run_name: str
    url: str
    owner: str
    state: str
    stopped: bool
    reason: str


def reap(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the active runs whose flow run or task run is over; return what was found, as dicts.

    ``credentials``: a ``DstackCredentials`` block, the name of a saved one, or None for the environment.
    ``min_age`` (seconds): how long the flow run must be over, for it stops its runs itself. Left alone are
    the runs submitted with ``on_crash="keep"`` unless their flow run was cancelled, those a task still
    waits for, and, unless ``stop_unknown``, those of flow runs that this Prefect server does not know: they
    may be another server's. A flow run that died without Prefect's notice is still Running there; Prefect's
    "Crash zombie flows" automation ends it. The result's fields are those of ``Finding``. Raises the server
    errors, and what Prefect's client raises.
    """
    from prefect.client.orchestration import get_client

    findings: list[Finding] = []
    with open_client(load(credentials), retry_budget=_BUDGET) as client, get_client(sync_client=True) as api:
        judge = _Judge(api, min_age, stop_unknown)
        for run in _active(client.runs.list()):
            finding = judge.finding(run)
            if finding.stopped and not dry_run:
                run.stop()
            findings.append(finding)
    return [asdict(finding) for finding in findings]


async def areap(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the active runs whose flow run is over: the twin of ``reap``, in a thread of its own."""
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
    """Stop the runs of flow runs that are over; for a flow on a schedule.

    Parameters, result and errors as in ``prefect_dstack.reaper.reap``.
    """
    findings = reap(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    _log(findings, dry_run)
    return findings


@task(cache_policy=NO_CACHE, retries=0)
async def areap_runs(
    credentials: CredentialsLike = None,
    *,
    dry_run: bool = False,
    min_age: float = 60.0,
    stop_unknown: bool = False,
) -> list[dict[str, Any]]:
    """Stop the runs of flow runs that are over: the async twin of ``reap_runs``."""
    findings = await areap(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    _log(findings, dry_run)
    return findings


class _Judge:
    """Decide about runs with what the Prefect server says."""

    def __init__(self, api: SyncPrefectClient, min_age: float, stop_unknown: bool) -> None:
        self._api = api
        self._min_age = min_age
        self._stop_unknown = stop_unknown

    def finding(self, run: Run) -> Finding:
        kind, owner_id = owner_of(run.marker) or ("", "")
        state = self._state(kind, owner_id)
        stopped, reason = self._verdict(run.marker or "", kind, owner_id, state)
        name = _UNKNOWN if state is None else str(state.name)
        return Finding(run.name, run.url, f"{kind}/{owner_id}", name, stopped, reason)

    def _verdict(self, marker: str, kind: str, owner_id: str, state: State[Any] | None) -> tuple[bool, str]:
        if state is None:
            return self._stop_unknown, "this Prefect server does not know its owner"
        if not state.is_final():
            return False, "its owner is not over"
        # The clocks of this machine and the server may differ a little: no harm at this scale.
        age = time.time() - state.timestamp.timestamp()
        if age < self._min_age:
            return False, f"its owner ended {age:.0f} s ago"
        if kind != "worker" and not state.is_cancelled() and outlives_crash(marker):
            return False, 'it was submitted with on_crash="keep"'
        if (
            (state.is_completed() or state.is_failed())
            and kind == "flow_run"
            and self._is_waited_for(owner_id)
        ):
            return False, "a task of its flow run still runs"
        return True, "its owner is over"

    def _state(self, kind: str, owner_id: str) -> State[Any] | None:
        from prefect.exceptions import ObjectNotFound

        try:
            if kind == "task_run":
                return self._api.read_task_run(UUID(owner_id)).state
            return self._api.read_flow_run(UUID(owner_id)).state
        except (ObjectNotFound, ValueError):
            return None

    def _is_waited_for(self, flow_run_id: str) -> bool:
        """Tell whether the flow returned before its submitted tasks, which Prefect lets finish."""
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterId,
            TaskRunFilter,
            TaskRunFilterState,
            TaskRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType

        # Older clients want the name to be given, if only as None.
        running = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING]), name=None)
        found = self._api.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)])),
            task_run_filter=TaskRunFilter(state=running),
            limit=1,
        )
        return bool(found)


def _active(runs: Iterable[Run]) -> list[Run]:
    """Return the active runs of flows, tasks and workers that were not asked to stop yet."""
    kinds = ("flow_run", "task_run", "worker")
    return [run for run in runs if not is_ending(run) and (owner_of(run.marker) or ("",))[0] in kinds]


def _log(findings: list[dict[str, Any]], dry_run: bool) -> None:
    logger = get_run_logger()
    for found in findings:
        did = "Left" if not found["stopped"] else "Would stop" if dry_run else "Asked the server to stop"
        logger.info(
            "%s run %s of %s (%s): %s",
            did,
            found["run_name"],
            found["owner"],
            found["state"],
            found["reason"],
        )
