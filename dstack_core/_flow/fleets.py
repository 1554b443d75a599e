"""Create, update and delete fleets exactly once (PROTOCOL 1.2).

The problem: when the reply to a request is lost, the fleet may or may not exist, and a machine that is not
known of costs money. A name may belong to a fleet of another user.

The idea: as for runs, the fleet of that name is fetched before a request and after each reply that is
refused, lost or malformed. What it is then decides: missing, it is created; with the caller's marker, or
without one where the caller has none, it is updated in place if it differs; with another marker it is left
alone and an error names it.

Invariants: a request never forces. A create is refused by the server while the name is taken, an update while
the fleet is not what was planned for, so a request that arrives late or twice changes nothing twice. A fleet
that is being deleted is waited for within the retry budget, since its name is free again soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dstack_core._flow.queries import active_runs
from dstack_core._flow.retry import Patience, RetryBudget
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._flow.submit import SETTLE_SECONDS
from dstack_core._flow.version_check import VersionCheck
from dstack_core._wire.api import Api
from dstack_core._wire.fleets import FleetApi, StoredFleet, StoredFleetPlan, fleet_spec
from dstack_core.errors import (
    ProtocolError,
    RequestRejectedError,
    ResourceNameTakenError,
    TransientServerError,
)
from dstack_core.models.fleets import Fleet, FleetConfiguration, check_machines

APPLY = "in-place update of a fleet"
# Seconds between two fetches while a fleet or its machines are waited for. Clouds take half a minute or more
# for a machine, so a shorter pause would only add requests.
PAUSE_SECONDS = 2.0
# How often the server may report that the fleet is being processed, or has changed since the plan. Its own
# workers hold a fleet for a second or two; without a limit another refusal with that text would never end.
_MOST_REFUSALS = 10
# The text of every server from 0.19.6 to 0.22.5 for both reasons (fleets/apply).
_MAY_PASS = ("being processed currently", "has been changed")
# The end of the refusal to delete what runs use, the same on 0.18.44 and 0.22.5 (fleets/delete).
_IN_USE = "in use"


def apply_fleet(
    api: FleetApi,
    versions: VersionCheck,
    configuration: FleetConfiguration,
    budget: RetryBudget,
    *,
    name: str,
    marker: str | None,
) -> Op[Fleet]:
    """Return the fleet of that name once it matches the configuration.

    Raises ``ResourceNameTakenError`` and the other server errors.
    """
    patience = Patience(budget)
    refusal: RequestRejectedError | None = None
    refusals = 0
    started: float | None = None
    while True:
        found = yield from call(api.get(name))
        if found is not None and marker is not None and found.fleet.marker != marker:
            raise _taken(api, found.fleet)
        if found is not None and found.fleet.is_terminating:
            started = budget.clock() if started is None else started
            if budget.clock() - started >= budget.seconds:
                raise _taken(api, found.fleet)
            yield Sleep(PAUSE_SECONDS)
            continue
        if refusal is not None:
            refusals += 1
            # Refused although the name is free: the request itself is wrong.
            gone = found is None and refusal.code != "resource_exists"
            if refusals > _MOST_REFUSALS or gone or (found is not None and not _may_pass(refusal)):
                raise refusal
            refusal = None
            yield Sleep(SETTLE_SECONDS)
        try:
            if found is None:
                spec = fleet_spec(configuration, name=name, marker=marker)
                by_apply = yield from _has_apply(versions)
                return (yield from call(api.create(spec, by_apply=by_apply))).fleet
            # Without a marker of the caller's the fleet keeps the one that it has.
            spec = fleet_spec(configuration, name=name, marker=marker or found.fleet.marker)
            plan = yield from call(api.get_plan(spec))
            if plan.current is None or plan.current.fleet.id != found.fleet.id:
                refusal = _taken(api, found.fleet)
                continue
            if not plan.changes:
                return plan.current.fleet
            if not (yield from _has_apply(versions)):
                raise _not_updatable(api, plan)
            return (yield from call(api.update(spec, plan.current))).fleet
        except RequestRejectedError as error:
            refusal = error
        except (TransientServerError, ProtocolError) as error:
            # A request whose reply was lost may still be at work; give it time to become visible.
            yield Sleep(max(patience.after(error), SETTLE_SECONDS))


def delete_fleet(
    api: FleetApi,
    name: str,
    *,
    instances: Sequence[int] | None,
    marker: str | None,
    until_deleted: bool,
    wait_for_runs: bool = False,
) -> Op[bool]:
    """Delete a fleet, or machines of it; return whether there was one.

    With ``wait_for_runs`` it is deleted once the runs that use it, or wait for one of its machines, have
    ended. Raises ``ResourceNameTakenError`` for a fleet with another marker, and the other server errors.
    """
    found = yield from call(api.get(name))
    if found is None:
        return False
    if marker is not None and found.fleet.marker != marker:
        raise _taken(api, found.fleet)
    # The server refuses a deletion for a run that has a machine. One that waits for its first would fail.
    while wait_for_runs and instances is None and (yield from _is_wanted(api.api, name)):
        yield Sleep(PAUSE_SECONDS)
    refusals = 0
    while True:
        try:
            if instances is None:
                yield from call(api.delete(name))
            else:
                yield from call(api.delete_instances(name, instances))
            break
        except RequestRejectedError as error:
            if wait_for_runs and _IN_USE in error.message:
                yield Sleep(PAUSE_SECONDS)
                now = yield from call(api.get(name))
                if now is None or now.fleet.id != found.fleet.id:
                    return True
                continue
            refusals += 1
            if refusals > _MOST_REFUSALS or not _may_pass(error):
                raise
            yield Sleep(SETTLE_SECONDS)
    while until_deleted and (yield from _is_left(api, found, instances)):
        yield Sleep(PAUSE_SECONDS)
    return True


def _is_wanted(api: Api, name: str) -> Op[bool]:
    """Return whether an active run names the fleet; it may be given as ``PROJECT/NAME``."""
    known = (name, f"{api.project}/{name}")
    active = yield from active_runs(api, lambda run: any(fleet in known for fleet in run.fleets))
    return bool(active)


def wait_for_machines(
    api: FleetApi, name: str, number: int, on_seen: Callable[[Fleet], None] = lambda _: None
) -> Op[Fleet | None]:
    """Wait until so many machines of the fleet are ready; None when it is gone.

    ``on_seen`` gets the fleet each time. Raises ``ConfigurationError`` if the fleet cannot have so many.
    """
    while True:
        found = yield from call(api.get(name))
        if found is None:
            return None
        on_seen(found.fleet)
        enough = sum(each.is_ready for each in found.fleet.instances) >= number
        if enough or found.fleet.is_terminating or found.fleet.has_ended:
            return found.fleet
        # Each time, because an update in place may change it.
        check_machines("machines", number, found.fleet.configuration)
        yield Sleep(PAUSE_SECONDS)


def _is_left(api: FleetApi, deleted: StoredFleet, instances: Sequence[int] | None) -> Op[bool]:
    now = yield from call(api.get(deleted.fleet.name))
    # Another fleet of that name is not the one that was deleted.
    if now is None or now.fleet.id != deleted.fleet.id:
        return False
    if instances is None:
        return not now.fleet.has_ended
    return any(each.number in instances and not each.has_ended for each in now.fleet.instances)


def _has_apply(versions: VersionCheck) -> Op[bool]:
    yield from versions.release()
    return not versions.lacks(APPLY)


def _may_pass(error: RequestRejectedError) -> bool:
    return error.code == "resource_exists" or any(text in error.message for text in _MAY_PASS)


def _taken(api: FleetApi, fleet: Fleet) -> ResourceNameTakenError:
    if fleet.is_terminating:
        return ResourceNameTakenError(
            f"name: expected a fleet name that is free, got {fleet.name!r}: that fleet is still being "
            f"deleted in project {fleet.project} on {api.api.server_url}. Try again in a minute, or choose "
            "another name."
        )
    owner = "without a marker" if fleet.marker is None else f"of another owner ({fleet.marker})"
    return ResourceNameTakenError(
        f"name: expected a fleet name that is free, got {fleet.name!r}: a fleet {owner} has it in project "
        f"{fleet.project} on {api.api.server_url}. Choose another name, or delete that fleet first."
    )


def _not_updatable(api: FleetApi, plan: StoredFleetPlan) -> RequestRejectedError:
    name = "" if plan.current is None else plan.current.fleet.name
    return RequestRejectedError(
        f"Fleet {name} exists, and this server cannot change it in place: {', '.join(plan.changes)}. "
        f"In-place updates need dstack >= 0.19.6 ({api.api.server_url}). Delete the fleet first, or leave "
        "that as it is."
    )
