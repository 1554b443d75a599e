"""Reading, stopping and deleting runs: runs/get, runs/list, runs/stop, runs/delete (PROTOCOL 1.7)."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from dstack_core.local.bodies import DeleteRunsRequest, GetRunRequest, ListRunsRequest, StopRunsRequest
from dstack_core.local.errors import bad_request, not_exists
from dstack_core.local.runs import Run
from dstack_core.local.state import USERNAME, State


def get_run(state: State, request: GetRunRequest) -> Run:
    """Return a run by its id (even if deleted), else by its name; raises ApiError 400 if neither exists."""
    if request.id is not None:
        run = state.runs.get(str(request.id))
    else:
        run = state.named.get(request.run_name or "")
    if run is None:
        raise not_exists("Run not found")
    return run


def list_runs(state: State, request: ListRunsRequest) -> list[dict[str, Any]]:
    """Return a page of runs as JSON data, newest first by default; deleted ones are included."""
    if request.repo_id is not None:
        if request.project_name is None:
            return []
        if request.project_name == state.settings.project and request.repo_id not in _known_repos(state):
            raise not_exists("Repo not found")
    runs = [run for run in state.runs.values() if _wanted(state, request, run)]
    runs.sort(key=_key, reverse=not request.ascending)
    if request.prev_submitted_at is not None:
        previous = request.prev_submitted_at
        if previous.tzinfo is None:
            previous = previous.replace(tzinfo=UTC)
        edge = (previous, str(request.prev_run_id or ""))
        runs = [run for run in runs if (_key(run) > edge if request.ascending else _key(run) < edge)]
    return [run.wire(request.include_jobs, request.job_submissions_limit) for run in runs[: request.limit]]


def _key(run: Run) -> tuple[Any, str]:
    return run.submitted_at, run.id


def _known_repos(state: State) -> set[str | None]:
    return {*state.repos, *(run.spec.repo_id for run in state.runs.values())}


def _wanted(state: State, request: ListRunsRequest, run: Run) -> bool:
    if request.project_name not in (None, state.settings.project) or request.username not in (None, USERNAME):
        return False
    if request.repo_id not in (None, run.spec.repo_id):
        return False
    return not (request.only_active and (run.finished or run.deleted))


def stop_runs(state: State, request: StopRunsRequest) -> None:
    """Send stop requests to runs; unknown and finished ones are ignored."""
    for name in request.runs_names:
        if (run := state.named.get(name)) is not None:
            run.stop_requests += 1
            if run.finished or state.scenarios.take("stop", name) is None:
                state.engine.stop(run, request.abort)


def delete_runs(state: State, request: DeleteRunsRequest) -> None:
    """Mark finished runs as deleted; raises ApiError 400 if one is active."""
    runs = [state.named[name] for name in request.runs_names if name in state.named]
    if active := [run.name for run in runs if not run.finished]:
        raise bad_request(f"Cannot delete active runs: {active}")
    for run in runs:
        state.delete(run)
