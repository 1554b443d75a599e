"""The event log behind events/list (PROTOCOL 1.9)."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from dstack_core.local.bodies import ListEventsRequest
from dstack_core.local.logs import iso
from dstack_core.local.runs import Job, Run, now

# Bounded, so that a server that runs for days does not keep growing: 10,000 events are some 10 MB. Older ones
# are no longer listed.
_KEPT = 10_000


class EventLog:
    """The newest events of one project."""

    def __init__(self, project_id: str, project_name: str) -> None:
        self._project = {"project_id": project_id, "project_name": project_name, "is_project_deleted": False}
        self._events: deque[tuple[datetime, str, dict[str, Any]]] = deque(maxlen=_KEPT)

    def status(self, run: Run, job: Job | None, old: str, new: str, reason: str | None = None) -> None:
        """Record that a run, or a job of it, has a new status."""
        if job is None:
            kind, target = "Run", {"type": "run", **self._project, "id": run.id, "name": run.name}
        else:
            name = job.spec["job_name"]
            kind, target = "Job", {"type": "job", **self._project, "id": job.latest.id, "name": name}
        ending = f". Termination reason: {reason.upper()}" if reason and new == "terminating" else ""
        moment = now()
        event = {
            "id": str(uuid4()),
            "message": f"{kind} status changed {old.upper()} -> {new.upper()}{ending}",
            "recorded_at": iso(moment),
            "actor_user_id": None,
            "actor_user": None,
            "is_actor_user_deleted": None,
            "targets": [target],
        }
        self._events.append((moment, run.id, event))

    def page(self, request: ListEventsRequest) -> list[dict[str, Any]]:
        """Return a page of events, newest first by default."""
        found = [
            (moment, event["id"], event)
            for moment, run_id, event in self._events
            if _wanted(request, run_id, event["targets"][0])
        ]
        found.sort(key=lambda entry: entry[:2], reverse=not request.ascending)
        if request.prev_recorded_at is not None:
            previous = request.prev_recorded_at
            if previous.tzinfo is None:
                previous = previous.replace(tzinfo=UTC)
            edge = (previous, str(request.prev_id or ""))
            found = [e for e in found if (e[:2] > edge if request.ascending else e[:2] < edge)]
        return [event for _, _, event in found[: request.limit]]


def _wanted(request: ListEventsRequest, run_id: str, target: dict[str, Any]) -> bool:
    if request.include_target_types is not None and target["type"] not in request.include_target_types:
        return False
    # Every event is about a run, or a job of a run, in the one project; no user is recorded as its actor.
    if request.within_projects is not None and target["project_id"] not in map(str, request.within_projects):
        return False
    if request.within_runs is not None and run_id not in map(str, request.within_runs):
        return False
    if request.actors is not None and None not in request.actors:
        return False
    kinds = ("projects", "users", "fleets", "instances", "volumes", "gateways", "gateway_replicas", "secrets")
    asked = {
        **{kind: getattr(request, f"target_{kind}") for kind in kinds},
        "run": request.target_runs,
        "job": request.target_jobs,
    }
    given = {kind: {str(one) for one in ids} for kind, ids in asked.items() if ids is not None}
    return not given or target["id"] in given.get(target["type"], set())
