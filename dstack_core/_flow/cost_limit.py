"""Runs with ``max_cost``: the limit that the server holds, and the stop by the run's followers.

The problem: no dstack server knows a limit on what a run costs. A follower sees the cost at each poll, but a
follower may be away.

The idea: two limits. A follower stops the run once the server's own ``cost``, which counts all its
attempts, has reached ``max_cost``. Before that, the submission gives the run a ``max_duration``: the time for
which ``max_cost`` lasts at the highest price that the plan shows, so that the server ends the run by itself.

Invariants: a poll follows within one interval after the moment at which the price reaches the limit, however
late the replies before it were. So the run costs at most ``max_cost``, an interval at its price, the two
replies, and its stop. A ``max_duration`` of the user's is never made longer. What one follower did, another
sees: the limit is in the run's environment, and a run that is stopping is not stopped again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import Api
from dstack_core._wire.machine_counts import most_machines
from dstack_core._wire.runs import RunSnapshot
from dstack_core._wire.spec_ends import max_price, max_seconds
from dstack_core.errors import ConfigurationError
from dstack_core.models.cost_limits import CostLimit
from dstack_core.models.money import format_price, format_usd

# The default poll interval. With a lower limit than its cost, every run would end at its first poll.
_POLL_SECONDS = 5.0
# Seconds between two polls close to the limit. Shorter waits save less than the stop itself costs.
_SHORTEST_WAIT = 1.0
# Seconds: a year. Machines without a price, or nearly so, need no guard.
_LONGEST_GUARD = 366 * 86400


def with_guard(
    api: Api, spec: Mapping[str, Any], planned: Mapping[str, Any], max_cost: float
) -> Op[dict[str, Any]]:
    """Return the spec with the ``max_duration`` for which ``max_cost`` lasts; fetches the plan.

    ``planned`` is the spec without code, which a server may not have yet. Raises ``ConfigurationError`` where
    no price is known, and where the limit is less than a run costs between two polls.
    """
    plan = yield from call(api.get_plan({**planned, "ssh_key_pub": spec["ssh_key_pub"]}))
    machines, price = most_machines(spec), plan.max_price_per_hour
    if price is None:
        price = max_price(spec)
    if price is None:
        raise ConfigurationError(
            f"max_cost: expected machines with a price, got none on offer for max_cost={max_cost:g}. "
            "Pass max_price too, or ask for other resources."
        )
    price *= machines
    if price * _POLL_SECONDS / 3600 > max_cost:
        raise ConfigurationError(
            f"max_cost: expected more than {format_usd(price * _POLL_SECONDS / 3600)}, which "
            f"{_POLL_SECONDS:g} s cost at {format_price(price)}, got {max_cost:g}. Raise it, or lower "
            "max_price."
        )
    guard = int(max_cost / price * 3600) if price * _LONGEST_GUARD > max_cost * 3600 else None
    own = max_seconds(spec)
    if guard is None or (own is not None and own <= guard):
        return dict(spec)
    configuration = spec["configuration"]
    env = {**configuration["env"], **CostLimit(max_cost, guard).env}
    return {**spec, "configuration": {**configuration, "env": env, "max_duration": guard}}


def stop_at_limit(api: Api, run: RunSnapshot, stops: Stops) -> Op[None]:
    """Stop a run, polled just now, that has cost as much as it may."""
    limit = run.cost_limit
    if limit is None or run.cost < limit.max_cost or run.status.is_ending or stops.is_pending(run.id):
        return
    yield from call(api.stop(run.name, abort=False))
    # A stop that the server drops is sent again by each follower.
    stops.note(run.id, abort=False)


def seconds_to_limit(run: RunSnapshot, interval: float) -> float | None:
    """Return the seconds after which a run should be polled for its cost; None without a limit or a price."""
    limit = run.cost_limit
    if limit is None or run.status.is_ending:
        return None
    latest = [job.submissions[-1] for job in run.jobs if job.submissions]
    price = sum(each.machine.price or 0.0 for each in latest if not each.is_finished)
    if not price:
        return None
    return max((limit.max_cost - run.cost) / price * 3600, min(interval, _SHORTEST_WAIT))
