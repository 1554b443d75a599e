"""The endpoints of what a project holds beside its runs: secrets, fleets, instances, gateways."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from starlette.requests import Request

from dstack_core.local import resource_bodies as bodies
from dstack_core.local.errors import bad_request, not_exists
from dstack_core.local.fleet_pool import where
from dstack_core.local.fleet_rules import can_update, check_fleet
from dstack_core.local.pages import page_of
from dstack_core.local.quantities import ResourcesSpec
from dstack_core.local.request_body import read_body
from dstack_core.local.state import USERNAME, State

Handler = Callable[[Request], Coroutine[Any, Any, Any]]

_MISSING = "Resource not found"
# A plan shows at most so many offers.
_MOST_OFFERS = 50


class ResourceApi:
    """The endpoints of secrets, fleets, instances and gateways, one method each."""

    def __init__(self, state: State) -> None:
        self._state = state

    def endpoints(self) -> Iterator[tuple[str, Handler]]:
        """Yield each path and its handler."""
        project = "/api/project/{project}"
        yield f"{project}/secrets/list", self._list_secrets
        yield f"{project}/secrets/get", self._get_secret
        yield f"{project}/secrets/create_or_update", self._set_secret
        yield f"{project}/secrets/delete", self._delete_secrets
        yield "/api/fleets/list", self._list_fleets
        yield f"{project}/fleets/list", self._list_project_fleets
        yield f"{project}/fleets/get", self._get_fleet
        yield f"{project}/fleets/get_plan", self._get_fleet_plan
        yield f"{project}/fleets/apply", self._apply_fleet
        yield f"{project}/fleets/delete", self._delete_fleets
        yield f"{project}/fleets/delete_instances", self._delete_instances
        yield "/api/instances/list", self._list_instances
        yield f"{project}/instances/get", self._get_instance
        yield f"{project}/gateways/list", self._list_gateways
        yield f"{project}/gateways/get", self._get_gateway
        yield f"{project}/gateways/delete", self._delete_gateways

    async def _list_secrets(self, request: Request) -> Any:
        return self._state.secrets.all()

    async def _get_secret(self, request: Request) -> Any:
        return self._state.secrets.get((await read_body(request, bodies.GetSecretRequest)).name)

    async def _set_secret(self, request: Request) -> Any:
        body = await read_body(request, bodies.SetSecretRequest)
        return self._state.secrets.set(body.name, body.value)

    async def _delete_secrets(self, request: Request) -> Any:
        self._state.secrets.delete((await read_body(request, bodies.DeleteSecretsRequest)).secrets_names)

    async def _list_fleets(self, request: Request) -> Any:
        body = await read_body(request, bodies.ListFleetsRequest)
        if body.project_name not in (None, self._state.settings.project):
            return []
        fleets = self._state.fleets.fleets.values()
        return [
            one.wire() for one in page_of((f for f in fleets if not (body.only_active and f.deleted)), body)
        ]

    async def _list_project_fleets(self, request: Request) -> Any:
        await read_body(request, bodies.ListProjectFleetsRequest, optional=True)
        return [one.wire() for one in reversed(self._state.fleets.present)]

    async def _get_fleet(self, request: Request) -> Any:
        body = await read_body(request, bodies.GetFleetRequest)
        if body.id is None and body.name is None:
            raise bad_request("name or id must be specified")
        pool = self._state.fleets
        found = pool.fleets.get(str(body.id)) if body.id is not None else pool.named(body.name or "")
        if found is None:
            raise not_exists(_MISSING)
        return found.wire()

    async def _get_fleet_plan(self, request: Request) -> Any:
        spec = (await read_body(request, bodies.GetFleetPlanRequest)).spec
        effective = check_fleet(spec)
        pool = self._state.fleets
        current = pool.named(spec.configuration.name or "")
        pool.check_hosts(effective, current)
        offers = []
        if spec.configuration.ssh_config is None:
            resources = effective.configuration.resources or ResourcesSpec()
            is_spot = effective.spot() is True
            offers = self._state.settings.inventory.offers(resources, where(effective), is_spot=is_spot)
        updates = current is not None and can_update(current.spec, effective)
        return {
            "project_name": self._state.settings.project,
            "user": USERNAME,
            "spec": spec.shown(),
            "effective_spec": effective.shown(),
            "current_resource": None if current is None else current.wire(),
            "offers": offers[:_MOST_OFFERS],
            "total_offers": len(offers),
            "max_offer_price": max((one["price"] for one in offers), default=None),
            "action": "update" if updates else "create",
        }

    async def _apply_fleet(self, request: Request) -> Any:
        body = await read_body(request, bodies.ApplyFleetPlanRequest)
        seen = body.plan.current_resource
        known = None if seen is None else (seen.id, seen.spec)
        return self._state.fleets.apply(body.plan.spec, known, body.force).wire()

    async def _delete_fleets(self, request: Request) -> Any:
        self._state.fleets.delete((await read_body(request, bodies.DeleteNamesRequest)).names)

    async def _delete_instances(self, request: Request) -> Any:
        body = await read_body(request, bodies.DeleteFleetInstancesRequest)
        self._state.fleets.delete([body.name], body.instance_nums)

    async def _list_instances(self, request: Request) -> Any:
        body = await read_body(request, bodies.ListInstancesRequest)
        if body.project_names is not None and self._state.settings.project not in body.project_names:
            return []
        fleets = None if body.fleet_ids is None else set(map(str, body.fleet_ids))
        found = [
            one
            for fleet in self._state.fleets.fleets.values()
            for one in (fleet.present if body.only_active else fleet.instances)
            if fleets is None or fleet.id in fleets
        ]
        return [one.wire() for one in page_of(found, body)]

    async def _get_instance(self, request: Request) -> Any:
        wanted = str((await read_body(request, bodies.GetInstanceRequest)).id)
        for fleet in self._state.fleets.fleets.values():
            for one in fleet.instances:
                if one.id == wanted:
                    return one.wire()
        raise not_exists(_MISSING)

    async def _list_gateways(self, request: Request) -> Any:
        return []

    async def _get_gateway(self, request: Request) -> Any:
        await read_body(request, bodies.GetNamedRequest)
        raise not_exists(_MISSING)

    async def _delete_gateways(self, request: Request) -> Any:
        await read_body(request, bodies.DeleteNamesRequest)
