"""Request bodies of the endpoints of secrets, fleets, instances and gateways, one strict model each."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, Field

from dstack_core.local.fleet_specs import FleetSpec
from dstack_core.local.quantities import Strict


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


class GetFleetRequest(Strict):
    """The body of fleets/get."""

    name: str | None = None
    id: UUID | None = None


class ListProjectFleetsRequest(Strict):
    """The body of the project's fleets/list, which may be left out."""

    include_imported: bool = False


class Page(Strict):
    """What the lists of all projects have in common."""

    only_active: bool = False
    prev_created_at: datetime | None = None
    prev_id: UUID | None = None
    limit: Annotated[int, Field(ge=0, le=100)] = 100
    ascending: bool = False


class ListFleetsRequest(Page):
    """The body of /api/fleets/list."""

    project_name: str | None = None
    include_imported: bool = False


class ListInstancesRequest(Page):
    """The body of /api/instances/list."""

    project_names: list[str] | None = None
    fleet_ids: list[UUID] | None = None
    include_imported: bool = False
    limit: int = 1000


class GetInstanceRequest(Strict):
    """The body of instances/get."""

    id: UUID


class GetFleetPlanRequest(Strict):
    """The body of fleets/get_plan."""

    spec: FleetSpec


class CurrentFleet(BaseModel):
    """The fleet of that name as the caller has seen it; keys that are not compared are ignored."""

    id: str
    spec: FleetSpec


class ApplyFleetPlanInput(Strict):
    """A fleet spec, and the fleet that the caller believes to exist."""

    spec: FleetSpec
    current_resource: CurrentFleet | None = None


class ApplyFleetPlanRequest(Strict):
    """The body of fleets/apply."""

    plan: ApplyFleetPlanInput
    force: bool


class DeleteNamesRequest(Strict):
    """The body of fleets/delete and gateways/delete."""

    names: list[str]


class DeleteFleetInstancesRequest(Strict):
    """The body of fleets/delete_instances."""

    name: str
    instance_nums: list[int]


class GetNamedRequest(Strict):
    """The body of gateways/get."""

    name: str
