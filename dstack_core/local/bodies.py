"""Request bodies of the endpoints, one strict model each (PROTOCOL 1.3 to 1.9)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import UUID4, BaseModel, Field

from dstack_core.local.quantities import Strict
from dstack_core.local.specs import RunSpec


class CurrentRun(BaseModel):
    """The run of that name as the caller has seen it; keys that are not compared are ignored."""

    id: str
    run_spec: RunSpec


class ApplyRunPlanInput(Strict):
    """A run spec, and the run that the caller believes to exist."""

    run_spec: RunSpec
    current_resource: CurrentRun | None = None


class ApplyRunPlanRequest(Strict):
    """The body of runs/apply."""

    plan: ApplyRunPlanInput
    force: bool


class GetRunPlanRequest(Strict):
    """The body of runs/get_plan."""

    run_spec: RunSpec
    max_offers: Annotated[int, Field(ge=1, le=10000)] | None = None
    reverse_offers: bool = False
    full_offers: bool = False
    unallocated_resources: bool = False
    for_offers_only: bool = False


class ListGpusRequest(Strict):
    """The body of gpus/list."""

    run_spec: RunSpec
    group_by: list[Literal["backend", "region", "count"]] | None = None
    reverse: bool = False
    full_offers: bool = False
    unallocated_resources: bool = False


class GetRunRequest(Strict):
    """The body of runs/get."""

    run_name: str | None = None
    id: UUID | None = None


class ListRunsRequest(Strict):
    """The body of runs/list."""

    project_name: str | None = None
    repo_id: str | None = None
    username: str | None = None
    only_active: bool = False
    include_jobs: bool = True
    job_submissions_limit: Annotated[int, Field(ge=0, le=10)] | None = None
    prev_submitted_at: datetime | None = None
    prev_run_id: UUID | None = None
    limit: Annotated[int, Field(ge=0, le=100)] = 100
    ascending: bool = False


class StopRunsRequest(Strict):
    """The body of runs/stop."""

    runs_names: list[str]
    abort: bool


class DeleteRunsRequest(Strict):
    """The body of runs/delete."""

    runs_names: list[str]


class PollLogsRequest(Strict):
    """The body of logs/poll."""

    run_name: str
    job_submission_id: UUID4
    start_time: datetime | None = None
    end_time: datetime | None = None
    descending: bool = False
    next_token: str | None = None
    limit: Annotated[int, Field(ge=0, le=1000)] = 100
    diagnose: bool = False


class ListEventsRequest(Strict):
    """The body of events/list."""

    target_projects: list[UUID] | None = None
    target_users: list[UUID] | None = None
    target_fleets: list[UUID] | None = None
    target_instances: list[UUID] | None = None
    target_runs: list[UUID] | None = None
    target_jobs: list[UUID] | None = None
    target_volumes: list[UUID] | None = None
    target_gateways: list[UUID] | None = None
    target_gateway_replicas: list[UUID] | None = None
    target_secrets: list[UUID] | None = None
    target_presets: list[UUID] | None = None
    within_projects: list[UUID] | None = None
    within_fleets: list[UUID] | None = None
    within_runs: list[UUID] | None = None
    within_gateways: list[UUID] | None = None
    include_target_types: list[str] | None = None
    actors: list[UUID | None] | None = None
    prev_recorded_at: datetime | None = None
    prev_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 100
    ascending: bool = False


class RemoteRepoInfo(Strict):
    """A git repo."""

    repo_type: Literal["remote"] = "remote"
    repo_name: str


class LocalRepoInfo(Strict):
    """A folder."""

    repo_type: Literal["local"] = "local"
    repo_dir: str


class VirtualRepoInfo(Strict):
    """The absence of a repo."""

    repo_type: Literal["virtual"] = "virtual"


class RemoteRepoCreds(Strict):
    """The URL and the credentials that a git repo is cloned with."""

    clone_url: str
    private_key: str | None = Field(default=None, repr=False)
    oauth_token: str | None = Field(default=None, repr=False)


class SaveRepoCredsRequest(Strict):
    """The body of repos/init."""

    repo_id: str
    repo_info: Annotated[RemoteRepoInfo | LocalRepoInfo | VirtualRepoInfo, Field(discriminator="repo_type")]
    repo_creds: RemoteRepoCreds | None = None


class GetRepoRequest(Strict):
    """The body of repos/get."""

    repo_id: str
    include_creds: bool


class DeleteReposRequest(Strict):
    """The body of repos/delete."""

    repos_ids: list[str]


class ListProjectsRequest(Strict):
    """The body of projects/list; its filters have no effect, because there is one project."""

    include_not_joined: bool = True
    return_total_count: bool = False
    name_pattern: str | None = None
    prev_created_at: datetime | None = None
    prev_id: UUID | None = None
    limit: Annotated[int, Field(ge=0, le=2000)] = 2000
    ascending: bool = False
    username: str | None = None


class GetFileArchiveByHashRequest(Strict):
    """The body of files/get_archive_by_hash."""

    hash: str


class GetSecretRequest(Strict):
    """The body of secrets/get."""

    name: str


class SetSecretRequest(Strict):
    """The body of secrets/create_or_update."""

    name: str
    value: str = Field(repr=False)


class DeleteSecretsRequest(Strict):
    """The body of secrets/delete."""

    secrets_names: list[str]
