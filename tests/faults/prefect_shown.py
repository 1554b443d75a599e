"""What Prefect shows about a flow run and its dstack runs, read from its REST API as the UI reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx

from dstack_core import Run
from tests.faults.latency_judge import Said
from tests.provider_prefect.support import until

FINAL = ("done", "failed", "terminated", "aborted")
# The most items that Prefect returns at once.
_PAGE = 200
_SENTINEL = "latency.sentinel"
# An upper bound for a busy machine; a wait returns as soon as its condition holds.
_SECONDS = 300.0


@dataclass(frozen=True)
class Api:
    """The REST API of the Prefect server at ``url``."""

    url: str

    def flow_run(self, flow_run_id: UUID) -> dict[str, Any]:
        """Return a flow run."""
        found: dict[str, Any] = self._request("GET", f"flow_runs/{flow_run_id}").json()
        return found

    def deployments(self) -> dict[str, UUID]:
        """Return the ids of all deployments by their names."""
        return {one["name"]: UUID(one["id"]) for one in self._all("deployments/filter", {})}

    def new_work_pool(self, name: str, kind: str, template: Mapping[str, Any]) -> UUID:
        """Create a work pool with one deployment, whose flow is never loaded; return the deployment's id."""
        self._post("work_pools/", {"name": name, "type": kind, "base_job_template": template})
        flow = self._post("flows/", {"name": name})["id"]
        body = {
            "name": name,
            "flow_id": flow,
            "work_pool_name": name,
            "entrypoint": "none.py:none",
            "path": ".",
        }
        return UUID(self._post("deployments/", body)["id"])

    def start(
        self,
        deployment: UUID,
        parameters: Mapping[str, Any],
        *,
        name: str,
        job_variables: Mapping[str, Any] | None = None,
    ) -> UUID:
        """Start a flow run of a deployment and return its id."""
        body = {
            "name": name,
            "parameters": parameters,
            "job_variables": job_variables,
            "state": {"type": "SCHEDULED"},
        }
        return UUID(self._post(f"deployments/{deployment}/create_flow_run", body)["id"])

    def set_state(self, flow_run_id: UUID, state: str, *, force: bool = False) -> None:
        """Set the state of a flow run, as the UI does."""
        body = {"state": {"type": state, "name": state.title()}, "force": force}
        status = self._post(f"flow_runs/{flow_run_id}/set_state", body)["status"]
        assert status == "ACCEPT", f"expected Prefect to accept {state}, got {status}"

    def state(self, flow_run_id: UUID) -> str:
        """Return the type of a flow run's state, such as CANCELLED."""
        return str((self.flow_run(flow_run_id)["state"] or {}).get("type"))

    def log(self, flow_run_id: UUID) -> list[Said]:
        """Return the records of a flow run and its tasks, oldest first."""
        chosen = {"logs": {"flow_run_id": {"any_": [str(flow_run_id)]}}, "sort": "TIMESTAMP_ASC"}
        return [Said(one["level"], one["message"]) for one in self._all("logs/filter", chosen)]

    def started(self, flow_run_id: UUID, *, of_task: bool) -> float:
        """Return the time when a flow run or its first task started, as ``time.time()``."""
        chosen = {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}}

        def start() -> str | None:
            found = self._all("task_runs/filter", chosen) if of_task else [self.flow_run(flow_run_id)]
            return found[0]["start_time"] if found else None

        at = until(start, seconds=_SECONDS, pause=0.5, what=f"the start of {flow_run_id} or its task")
        assert at is not None
        return datetime.fromisoformat(at).timestamp()

    def task_states(self, flow_run_id: UUID) -> list[str]:
        """Return the types of the states of a flow run's tasks."""
        chosen = {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}}
        return [str(one["state_type"]) for one in self._all("task_runs/filter", chosen)]

    def events(self, run_id: str) -> list[str]:
        """Return the names of the events of a dstack run, without their common prefix."""
        return [name.removeprefix("dstack.run.") for name in self._events(f"dstack.run.{run_id}")]

    def artifacts(self, flow_run_id: UUID, run_name: str) -> tuple[list[str], list[tuple[float, str]]]:
        """Return the tables of a dstack run, and the percentages and texts of its progress artifacts."""
        mine = {"flow_run_id": {"any_": [str(flow_run_id)]}}
        found = [
            one
            for kind in ("markdown", "progress")
            for one in self._all("artifacts/filter", {"artifacts": mine | {"type": {"any_": [kind]}}})
            if run_name in (one["description"] or "")
        ]
        tables = [str(one["data"]) for one in found if one["type"] == "markdown"]
        progress = [
            (float(one["data"]), str(one["description"])) for one in found if one["type"] == "progress"
        ]
        return tables, progress

    def settle_events(self) -> None:
        """Wait until Prefect shows every event that was sent before."""
        resource = f"latency.{uuid4()}"
        event = {
            "event": _SENTINEL,
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": resource},
        }
        self._request("POST", "events", [event])
        until(
            lambda: self._events(resource),
            seconds=_SECONDS,
            pause=0.5,
            what="the sentinel among Prefect's events",
        )

    def _events(self, resource: str) -> list[str]:
        since = (datetime.now(UTC) - timedelta(days=1)).isoformat()
        chosen = {"resource": {"id": [resource]}, "occurred": {"since": since}}
        found = self._post("events/filter", {"filter": chosen, "limit": 50})
        return [str(one["event"]) for one in found["events"]]

    def _all(self, path: str, chosen: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self._post(path, {**chosen, "limit": _PAGE, "offset": len(found)})
            found += page
            if len(page) < _PAGE:
                return found

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body).json()

    def _request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        def answered() -> httpx.Response | None:
            reply = httpx.request(method, f"{self.url}/{path}", json=body, timeout=60)
            # Prefect answers 503 while its sqlite database is busy.
            return None if reply.status_code == 503 else reply

        reply = until(answered, seconds=_SECONDS, pause=0.5, what=f"an answer to {method} {path}")
        assert reply is not None
        return reply.raise_for_status()


def disagreement(api: Api, flow_run_id: UUID, run: Run, *, has_artifacts: bool) -> str:
    """Return where Prefect differs from the dstack server about an ended run, or an empty string.

    The end must be reported exactly once, whichever process does it.
    """
    status, events = run.raw_status, api.events(run.id)
    ends = [name for name in events if name in FINAL]
    if ends != [status]:
        return f"expected one event {status}, got {ends or 'none'}"
    if not has_artifacts:
        return ""
    tables, progress = api.artifacts(flow_run_id, run.name)
    if sum(f"| Status | {status} |" in table for table in tables) != 1:
        return f"expected one outcome table with {status}, got {len(tables)}"
    if len(progress) != 1:
        return f"expected one progress artifact, got {len(progress)}"
    for percent, text in progress:
        if percent != 100 or status not in text:
            return f"expected progress 100 % and {status}, got {percent:g} % ({text})"
    return ""


def wait_until_over(api: Api, flow_run_id: UUID, seconds: float) -> str:
    """Return the type of a flow run's state once it is final, or after this many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        state = api.state(flow_run_id)
        if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") or time.monotonic() > deadline:
            return state
        time.sleep(0.3)
