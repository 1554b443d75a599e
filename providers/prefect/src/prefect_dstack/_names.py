"""The owner of a run, and the names and markers that another execution of the same flow run finds again.

The problem: Prefect gives task runs new random ids whenever their flow run is executed again. An execution
must nevertheless find the runs of the one before it, and two equal tasks must never share a run.

The idea: the marker on a run holds the flow run's id, ``on_crash``, a hash of what is submitted, and the
ordinal of the task among the equal ones of its flow run; equal tasks are interchangeable, so their order does
not matter. Hooks, worker and reaper know from it whose run it is. The run's name is what people read, the
flow and the task, with a hash of the marker.

Earlier versions had names of ids and hashes. A flow run that is executed again may have a run of such a
version, so only then its name is looked up as well; the marker never changed.

Where the ordinal is not known (tasks of Dask, Ray and process pools are counted in several processes), the
end of the random id takes its place: no run is shared, and another execution of the flow run submits new
ones.
"""

from __future__ import annotations

import inspect
import json
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect.context import FlowRunContext, TaskRunContext

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from prefect import Task

    from dstack_core.integration import AttemptNames

_ENGINE = "prefect"
# The number of an attempt, such as -999, follows.
_LONGEST_NAME = 37
# Those of the names of earlier versions.
_LONGEST_PREFIX = 9
_DEFAULT_PREFIX = "pf"
_LABELS = "prefect.io/"


@dataclass(frozen=True, slots=True)
class Owner:
    """The task or flow that a run belongs to.

    ``task_run_id`` is a random id where there is no task. ``flow_run_id`` is None outside a flow.
    ``flow_run_count`` grows with each retry of the flow. ``shares_process``: all tasks of the flow run are
    counted in this process, which is not the case with Dask, Ray and process pools. ``call`` is the number of
    an equal submission of the same task. ``is_tracked`` is false if the Prefect server does not know the
    owner. ``flow_name`` and ``task_name`` are what people call it, None where it has no name of its own.
    """

    task_run_id: str
    flow_run_id: str | None
    flow_run_count: int
    shares_process: bool
    call: int = 0
    is_tracked: bool = True
    flow_name: str | None = None
    task_name: str | None = None


def task_owner() -> Owner:
    """Return who runs the current task. Raises Prefect's ``MissingContextError`` outside of one."""
    context = TaskRunContext.get()
    if context is None:
        from prefect.exceptions import MissingContextError

        raise MissingContextError("this runs only as a Prefect task; call it without .fn")
    flow = FlowRunContext.get()
    run = context.task_run
    return Owner(
        task_run_id=str(run.id),
        flow_run_id=str(run.flow_run_id) if run.flow_run_id else None,
        flow_run_count=run.flow_run_run_count,
        shares_process=flow is not None and not flow.detached,
        flow_name=None if flow is None or flow.flow is None else flow.flow.name,
        task_name=name_of_task(context.task),
    )


class Calls:
    """The numbers of the submissions of a task or flow that may make several; a retry starts again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int, str], int] = {}

    def next(self, owner_id: str, run_count: int, what: str) -> int:
        """Return how many equal submissions this execution of the owner has made."""
        key = (owner_id, run_count, what)
        with self._lock:
            self._made[key] = self._made.get(key, -1) + 1
            return self._made[key]


_calls = Calls()


def calling_owner(what: str) -> Owner:
    """Return who calls a block: the current task, else the current flow, else a script.

    ``what`` describes the submission, so that equal ones get different names.
    """
    context, flow = TaskRunContext.get(), FlowRunContext.get()
    if context is not None:
        owner = task_owner()
        # One task may trigger several equal blocks; each is a run of its own.
        call = _calls.next(owner.task_run_id, context.task_run.run_count, what)
        return replace(owner, call=call)
    if flow is not None and flow.flow_run is not None:
        run = flow.flow_run
        call = _calls.next(str(run.id), run.run_count, what)
        name = None if flow.flow is None else flow.flow.name
        return Owner(str(run.id), str(run.id), run.run_count, shares_process=True, call=call, flow_name=name)
    # Outside of Prefect nothing is executed again, so a random id is enough.
    return Owner(str(uuid4()), None, 0, shares_process=False, is_tracked=False)


class Ordinals:
    """The numbers of equal tasks of one flow run in this process; a retried task keeps its number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, str], dict[str, int]] = {}

    def ordinal(self, owner: Owner, fingerprint: str) -> str:
        """Return the number of this task among the equal ones.

        Task runs get new random ids whenever their flow run is executed again, so only the order can
        name them; equal tasks are interchangeable. Where the order is not known the task run's own
        random id keeps two of them from sharing a run.
        """
        if owner.flow_run_id is None or not owner.shares_process:
            return f"{owner.task_run_id[-6:]}-{owner.call}" if owner.call else owner.task_run_id[-8:]
        key = (owner.flow_run_id, owner.flow_run_count, fingerprint)
        # The key holds the execution: another one in the same process counts from the start again.
        with self._lock:
            seen = self._seen.setdefault(key, {})
            return str(seen.setdefault(f"{owner.task_run_id}/{owner.call}", len(seen)))


_ordinals = Ordinals()


def identify(
    owner: Owner,
    spec: dict[str, Any],
    *,
    on_crash: str,
    run_name: str | None = None,
    prefix: str | None = None,
    ordinals: Ordinals = _ordinals,
) -> AttemptNames:
    """Return the names of the runs of the task that ``owner`` runs with ``spec`` (JSON-plain).

    Args:
        owner: The task or flow.
        spec: What is submitted, without secrets.
        on_crash: ``"stop"`` or ``"keep"``; the marker holds it.
        run_name: The caller's own name, which all attempts have.
        prefix: What the task is called in a generated name. Default: the owner's name for it.
        ordinals: What counts the equal tasks of a flow run.

    Returns:
        The names and markers of all attempts; a generated name holds at most 41 characters (PROTOCOL 1.4).
    """
    from dstack_core.integration import AttemptNames
    from dstack_core.integration import run_name as readable_name

    fingerprint = _hash(spec, on_crash, run_name)
    ordinal = ordinals.ordinal(owner, fingerprint)
    stem = f"{marker_prefix(owner)}{on_crash}/{fingerprint}-{ordinal}"
    parts = [owner.flow_name, prefix or owner.task_name]
    is_again = owner.flow_run_id is not None and owner.shares_process and owner.flow_run_count > 1
    return AttemptNames(
        base=readable_name(parts, stem, longest=_LONGEST_NAME),
        stem=stem,
        fixed_name=run_name,
        former_base=_former_base(owner, prefix, fingerprint, ordinal) if is_again else None,
    )


def _former_base(owner: Owner, prefix: str | None, fingerprint: str, ordinal: str) -> str:
    """Return the name that earlier versions gave to the run of the first attempt."""
    from dstack_core.integration import slug

    # The ids are time-ordered UUIDs: those of one minute begin alike and differ only at the end.
    tail = (owner.flow_run_id or owner.task_run_id)[-12:]
    start = slug(prefix, default=_DEFAULT_PREFIX, longest=_LONGEST_PREFIX)
    return f"{start}-{tail}-{fingerprint}-{ordinal}"


def machine_names(flow_run_id: UUID, labels: Mapping[str, str | None]) -> AttemptNames:
    """Return the names of the machines of a work pool's flow run; ``labels`` are what Prefect labels them."""
    from dstack_core.integration import AttemptNames
    from dstack_core.integration import run_name as readable_name

    prefix = worker_marker_prefix(flow_run_id)
    parts = [labels.get(f"{_LABELS}flow-name"), labels.get(f"{_LABELS}deployment-name")]
    return AttemptNames(readable_name(parts, prefix, longest=_LONGEST_NAME), prefix.rstrip("/"))


def former_machine_name(flow_run_id: UUID, number: int) -> str:
    """Return the name that earlier versions gave to a machine of that number."""
    return f"pf-{str(flow_run_id)[-12:]}-w{number}"


def marker_prefix(owner: Owner) -> str:
    """Return the prefix of the markers of everything that ``owner`` started."""
    if owner.flow_run_id is not None:
        return flow_run_marker_prefix(owner.flow_run_id)
    return _marker_prefix("task_run" if owner.is_tracked else "script", owner.task_run_id)


def flow_run_marker_prefix(flow_run_id: str) -> str:
    """Return the prefix of the markers of all runs of a flow run."""
    return _marker_prefix("flow_run", flow_run_id)


def worker_marker_prefix(flow_run_id: UUID) -> str:
    """Return the prefix of the markers of the machines that a worker starts for a flow run."""
    return _marker_prefix("worker", str(flow_run_id))


def outlives_crash(marker: str) -> bool:
    """Whether the run with this marker was submitted with ``on_crash="keep"``."""
    from dstack_core.integration import read_marker

    return read_marker(marker, _ENGINE)[2:3] == ("keep",)


def owner_of(marker: str | None) -> tuple[str, str] | None:
    """Return the kind (``flow_run``, ``task_run``, ``worker``, ``script``) and id of a marker's owner.

    None when the marker is not this package's.
    """
    from dstack_core.integration import read_marker

    match read_marker(marker, _ENGINE):
        case (kind, owner_id, *attempt) if any(attempt):
            return kind, owner_id
    return None


def name_of_task(task: Task[..., Any]) -> str | None:
    """Return what the user calls a task; None for one of this package that has its own name."""
    function = task.fn
    is_ours = (function.__module__ or "").startswith("prefect_dstack.")
    return None if is_ours and task.name == function.__name__ else task.name


def own_parameters() -> list[str]:
    """Return the parameters of the current task that have names, without its options."""
    context = TaskRunContext.get()
    if context is None:
        return []
    parameters = inspect.signature(context.task.fn).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def _marker_prefix(kind: str, owner_id: str) -> str:
    from dstack_core.integration import make_marker

    return make_marker(_ENGINE, kind, owner_id, "")


def _hash(spec: dict[str, Any], on_crash: str, run_name: str | None) -> str:
    from dstack_core.integration import short_hash

    return short_hash(json.dumps([spec, on_crash, run_name], sort_keys=True, default=str), 6)
