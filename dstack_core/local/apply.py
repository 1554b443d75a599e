"""Plans and submissions, and what happens to a run of the same name (PROTOCOL 1.4).

``apply`` creates a run, updates it in place, or refuses. In this order:

1. Without a run of that name, or if it has finished, a new run is created.
2. A run that is stopping, or whose changes need a new run (`updates`), is in the way: 400.
3. Without ``force`` the caller must send the run as it is now, with the same id and spec: 400 if it differs.
   This is the check that lets a client submit without ever starting a second run.
4. Otherwise the run is updated in place and keeps its id.

A real server reads the existing run first and creates the new one later. Two submissions at the same time
therefore both find the name free, and the second one fails at its creation, with a message of its own. The
pause of one step between reading and creating makes that happen here as well.
"""

from __future__ import annotations

from typing import Any

from dstack_core import clock
from dstack_core.local.bodies import ApplyRunPlanRequest, CurrentRun, GetRunPlanRequest
from dstack_core.local.checks import check_spec, with_defaults
from dstack_core.local.errors import bad_request
from dstack_core.local.job_specs import build_job_specs
from dstack_core.local.random_names import unused_name
from dstack_core.local.runs import Job, Run, Submission
from dstack_core.local.specs import RunSpec
from dstack_core.local.state import USERNAME, State
from dstack_core.local.updates import can_update

_CANNOT_OVERRIDE = "Cannot override active run. Stop the run first."
_CHANGED = "Failed to apply plan. Resource has been changed. Try again or use force apply."


def _check_emulated(spec: RunSpec) -> None:
    """Raise ApiError 400 for what this server does not emulate."""
    if spec.setting("schedule") is not None:
        raise bad_request("The embedded server does not support schedule")


def _check_repo(state: State, spec: RunSpec) -> None:
    if spec.repo_data is None or spec.repo_data.repo_type == "virtual":
        return
    if spec.repo_id not in state.repos:
        raise bad_request(f"Repo {spec.repo_id} does not exist", "repo_does_not_exist")


async def get_plan(state: State, request: GetRunPlanRequest) -> dict[str, Any]:
    """Return the plan of a run as JSON data; nothing is changed."""
    spec = request.run_spec
    check_spec(spec)
    _check_emulated(spec)
    effective = with_defaults(spec, (await state.keys.pair())[0])
    current = state.named.get(spec.run_name or "")
    updates = current is not None and not current.finished and can_update(current.spec, effective)
    job_specs = build_job_specs(effective, spec.run_name or "dry-run")
    # A plan needs volumes that exist, not active ones.
    state.volumes.find(job_specs[0])
    return {
        "project_name": state.settings.project,
        "user": USERNAME,
        "run_spec": spec.model_dump(mode="json"),
        "effective_run_spec": effective.model_dump(mode="json"),
        "job_plans": [
            _job_plan(state, effective, job_spec, request.for_offers_only) for job_spec in job_specs
        ],
        "current_resource": None if current is None else current.wire(),
        "action": "update" if updates else "create",
    }


def _job_plan(state: State, spec: RunSpec, job_spec: dict[str, Any], for_offers: bool) -> dict[str, Any]:
    offers = state.machines.plan(spec, job_spec, job_spec["jobs_per_replica"], for_offers=for_offers)
    return {
        "job_spec": job_spec,
        "offers": offers,
        "total_offers": len(offers),
        "max_price": max((one["price"] for one in offers), default=None),
    }


async def apply(state: State, request: ApplyRunPlanRequest) -> Run:
    """Create a run or update it in place; raises ApiError 400 if an active run is in the way."""
    spec = request.plan.run_spec
    check_spec(spec)
    _check_emulated(spec)
    _check_repo(state, spec)
    # Read the existing run first and create the new one after a pause, as the real server does: of several
    # requests at the same time, one wins and the others fail with a message of their own.
    current = state.named.get(spec.run_name or "")
    effective = with_defaults(spec, (await state.keys.pair())[0])
    await clock.asleep(state.settings.pace.step, caller=False)
    if current is None or current.finished:
        return _create(state, effective, spec.configuration.model_dump(mode="json", exclude_unset=True))
    if current.status == "terminating" or not can_update(current.spec, effective):
        raise bad_request(_CANNOT_OVERRIDE)
    if not request.force and not _expected(request.plan.current_resource, current):
        raise bad_request(_CHANGED)
    state.engine.update(current, effective)
    return current


def _create(state: State, spec: RunSpec, submitted: dict[str, Any]) -> Run:
    spec.run_name = spec.run_name or unused_name(state.named)
    existing = state.named.get(spec.run_name)
    if existing is not None and not existing.finished:
        raise bad_request(f"Cannot delete active runs: ['{spec.run_name}']")
    job_specs = build_job_specs(spec, spec.run_name)
    for job_spec in job_specs:
        state.volumes.check(job_spec)
    jobs = [Job(job_spec, [Submission(0, 0)]) for job_spec in job_specs]
    run = Run(state.settings.project, USERNAME, spec, jobs, submitted=submitted)
    state.add(run)
    return run


def _expected(seen: CurrentRun | None, run: Run) -> bool:
    # dstack's own client leaves out keys that have their default value, so the model dumps both sides.
    return (
        seen is not None
        and seen.id == run.id
        and seen.run_spec.model_dump(mode="json") == run.spec.model_dump(mode="json")
    )
