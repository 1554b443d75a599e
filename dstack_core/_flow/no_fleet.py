"""Find out whether a plan has no machine because the project has no fleet for it (PROTOCOL 1.4, 2.2).

The plan of such a project is one without offers, as when all machines are taken. The fleets are listed only
then, and only on servers whose runs need a fleet.
"""

from __future__ import annotations

from dataclasses import replace

from dstack_core._flow.steps import Op, call
from dstack_core._flow.version_check import VersionCheck
from dstack_core._wire.api import Api
from dstack_core._wire.fleets import FleetApi
from dstack_core.errors import ServerError
from dstack_core.models.no_fleet import no_fleet_hint
from dstack_core.models.plan import Plan

_NEED = "runs on fleets only"


def with_fleet_hint(api: Api, versions: VersionCheck, plan: Plan) -> Op[Plan]:
    """Return the plan, with what is to be done about fleets where no machine is on offer.

    A list of fleets that the server refuses changes nothing: the plan is good without it.
    """
    if plan.offers:
        return plan
    try:
        if (yield from versions.release()) is None or versions.lacks(_NEED):
            return plan
        fleets = yield from call(FleetApi(api).list())
    except ServerError:
        return plan
    usable = sum(not each.is_terminating and not each.has_ended for each in fleets)
    if plan.hints:
        # What is wrong with the request is the nearer reason.
        return replace(plan, fleets=usable)
    return replace(plan, hints=(*plan.hints, no_fleet_hint(api.project, usable)), fleets=usable)
