"""Submit a run, or update the active one of that name in place (PROTOCOL 1.4).

The result of an update is known before it is sent: the plan has the spec that the server would keep. After a
lost reply the run is fetched, and a run with that spec needs nothing more. Each request names the run as it
was planned for, so one that arrives late, or twice, meets another run and is refused. Anything may happen to
the run between the plan and the request; then both are repeated, a few times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dstack_core._flow.retry import Patience, RetryBudget
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._flow.submit import SETTLE_SECONDS, submit, unknown
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core._wire.spec import with_default_tags, with_tags_kept
from dstack_core._wire.updates import Resource, UpdatePlan, same_spec, update_of
from dstack_core.errors import (
    ProtocolError,
    RequestRejectedError,
    RunNameTakenError,
    RunNotUpdatableError,
    TransientServerError,
)

# How often the run may change between plan and request. Being overtaken by a faster client happens once,
# seldom twice; without a limit, two clients that apply different specs in a loop would never end.
_MOST_LOST_RACES = 4


def apply(
    api: Api,
    run_spec: Mapping[str, Any],
    budget: RetryBudget,
    *,
    marker: str | None,
    default_tags: Mapping[str, str] = MappingProxyType({}),
) -> Op[RunSnapshot]:
    """Return the run of this spec's name once it matches the spec.

    An active run is updated in place, and left alone when there is nothing to change; it keeps its marker
    unless one is given. Where no run is active, one is submitted with the spec's own marker; a finished run
    that carries ``marker`` is returned as it is. A run that is submitted gets the ``default_tags``; one
    that is updated keeps those that it has. Raises ``RunNotUpdatableError`` when a change needs a new run,
    and the other server errors.
    """
    patience = Patience(budget)
    sent: _Sent | None = None
    refusal: RequestRejectedError | None = None
    is_unknown = False
    lost_races = 0
    while True:
        try:
            found = yield from call(api.get_resource(run_spec["run_name"]))
        except ProtocolError as error:
            if is_unknown:
                raise unknown(error, run_spec["run_name"]) from error
            raise
        if sent is not None and found is not None and sent.made(found):
            return found.run
        # The server refuses with the same text whether the run changed since the plan or the request itself
        # is wrong. Only the run as it is now shows which: if it has not changed, the refusal is raised.
        if refusal is not None:
            lost_races += 1
            if lost_races > _MOST_LOST_RACES or (sent is not None and sent.left_alone(found)):
                raise refusal
            refusal = None
        if found is None or not found.run.is_active:
            try:
                return (
                    yield from submit(
                        api,
                        with_default_tags(run_spec, default_tags),
                        budget,
                        replace_finished=True,
                        look_first=marker is not None,
                    )
                )
            except RunNameTakenError as error:
                # Another client submitted a run of that name meanwhile: next, that one is updated.
                refusal, sent = error, None
                continue
        wanted = update_of(found, with_tags_kept(run_spec, default_tags, found.spec), marker=marker)
        plan = yield from call(api.get_update_plan(wanted))
        # The plan is a request of its own, so it may be about a run that replaced the one just found.
        if plan.current is None or plan.current.run.id != found.run.id:
            refusal, sent = _replaced(api, found.run), None
            continue
        if plan.changes_nothing:
            return plan.current.run
        if plan.current.is_ending or plan.is_possible is False:
            raise _not_updatable(api, plan)
        sent = _Sent(found, plan)
        try:
            return (yield from call(api.update(wanted, plan.current)))
        except RequestRejectedError as error:
            # A server whose plan has no action refuses every change with the same text.
            refusal = error if plan.is_possible else _not_updatable(api, plan)
        except (TransientServerError, ProtocolError) as error:
            is_unknown = True
            # A request whose reply was lost may still be at work; give it time to become visible.
            yield Sleep(max(patience.after(error), SETTLE_SECONDS))


@dataclass(frozen=True, slots=True)
class _Sent:
    """An update that was sent: the run it was meant for, and its plan."""

    found: Resource
    plan: UpdatePlan

    def made(self, now: Resource) -> bool:
        """Return whether the run is what the update was meant to make of it."""
        return now.run.id == self.found.run.id and same_spec(now.spec, self.plan.effective)

    def left_alone(self, now: Resource | None) -> bool:
        """Return whether the run is unchanged since then: a refusal is about the request itself."""
        is_same_run = now is not None and now.run.id == self.found.run.id and now.run.is_active
        return now is not None and is_same_run and same_spec(now.spec, self.found.spec)


def _replaced(api: Api, run: RunSnapshot) -> RequestRejectedError:
    return RunNameTakenError(
        f"Run {run.name} was replaced by another run while its update was planned. "
        f"Find out what submits it, and apply again: {api.runs_url()}"
    )


def _not_updatable(api: Api, plan: UpdatePlan) -> RunNotUpdatableError:
    run = plan.current.run if plan.current is not None else None
    name, url = ("", api.runs_url()) if run is None else (run.name, api.run_url(run.id))
    if plan.current is not None and plan.current.is_ending:
        return RunNotUpdatableError(
            f"Run {name} is stopping and can no longer be updated. Apply again when it has ended: {url}"
        )
    changes = plan.blocking
    return RunNotUpdatableError(
        f"Run {name} is active, and what would change needs a new run: {', '.join(changes)}. "
        f"Stop the run first, or leave that as it is: {url}",
        changes=changes,
    )
