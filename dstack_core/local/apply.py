"""Submitting: plans, and what happens to a run of the same name (PROTOCOL 1.4)."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from dstack_core.local.bodies import ApplyRunPlanRequest, GetRunPlanRequest
from dstack_core.local.errors import bad_request
from dstack_core.local.job_specs import build_job_specs
from dstack_core.local.runs import Job, Run, Submission
from dstack_core.local.specs import RunSpec, ServiceConfiguration, TaskConfiguration
from dstack_core.local.state import USERNAME, State
from dstack_core.local.updates import can_update

NAME_PATTERN = "^[a-z][a-z0-9-]{1,40}$"
_CANNOT_OVERRIDE = "Cannot override active run. Stop the run first."
_CHANGED = "Failed to apply plan. Resource has been changed. Try again or use force apply."


def check_spec(state: State, spec: RunSpec) -> None:
    """Raise ApiError 400 for what the schema cannot see: the name, the repo, what this server cannot do."""
    if spec.run_name is not None and re.fullmatch(NAME_PATTERN, spec.run_name) is None:
        raise bad_request(f"Resource name should match regex '{NAME_PATTERN}'")
    if (spec.repo_id is None) != (spec.repo_data is None):
        raise bad_request("repo_id and repo_data must be set together")
    configuration = spec.configuration
    if isinstance(configuration, TaskConfiguration | ServiceConfiguration) and configuration.groups:
        raise bad_request("The embedded server does not support groups")
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
    check_spec(state, spec)
    effective = spec.with_defaults((await state.keys.pair())[0])
    current = state.named.get(spec.run_name or "")
    inventory, resources = state.settings.inventory, effective.configuration.resources
    offers = []
    if inventory.fits(resources, effective.setting("max_price")):
        offers.append(inventory.offer(resources))
    updates = current is not None and not current.finished and can_update(current.spec, effective)
    return {
        "project_name": state.settings.project,
        "user": USERNAME,
        "run_spec": spec.model_dump(mode="json"),
        "effective_run_spec": effective.model_dump(mode="json"),
        "job_plans": [
            {
                "job_spec": job_spec,
                "offers": offers,
                "total_offers": len(offers),
                "max_price": inventory.price if offers else None,
            }
            for job_spec in build_job_specs(effective, spec.run_name or "dry-run")
        ],
        "current_resource": None if current is None else current.wire(),
        "action": "update" if updates else "create",
    }


async def apply(state: State, request: ApplyRunPlanRequest) -> Run:
    """Create a run or update it in place; raises ApiError 400 if an active run is in the way."""
    spec = request.plan.run_spec
    check_spec(state, spec)
    _check_repo(state, spec)
    # What exists is looked at first and the run made later, as the real server does: of several applies at
    # the same time one wins and the others fail with a message of their own.
    current = state.named.get(spec.run_name or "")
    effective = spec.with_defaults((await state.keys.pair())[0])
    await asyncio.sleep(state.settings.pace.step)
    if current is None or current.finished:
        return _create(state, effective)
    if current.status == "terminating" or not can_update(current.spec, effective):
        raise bad_request(_CANNOT_OVERRIDE)
    if not request.force and not _expected(request.plan.current_resource, current):
        raise bad_request(_CHANGED)
    state.engine.update(current, effective)
    return current


def _create(state: State, spec: RunSpec) -> Run:
    spec.run_name = spec.run_name or state.random_name()
    existing = state.named.get(spec.run_name)
    if existing is not None and not existing.finished:
        raise bad_request(f"Cannot delete active runs: ['{spec.run_name}']")
    jobs = [Job(job_spec, [Submission(0, 0)]) for job_spec in build_job_specs(spec, spec.run_name)]
    run = Run(state.settings.project, USERNAME, spec, jobs, state.settings.inventory.price)
    state.add(run)
    return run


def _expected(resource: dict[str, Any] | None, run: Run) -> bool:
    return (
        resource is not None
        and resource.get("id") == run.id
        and resource.get("run_spec") == run.spec.model_dump(mode="json")
    )
