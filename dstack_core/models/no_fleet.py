"""What to do where no fleet can take a run: since dstack 0.20 each run is placed on a machine of a fleet.

Two ways out are named: the file of a fleet that lasts, for ``dstack apply``, and what creates a fleet from
code, which each engine calls by its own name. The file has no machine until a run needs one, so it costs
nothing by itself.
"""

from __future__ import annotations

from dstack_core.models.plan import Plan

NO_FLEET = "capacity.no_fleet"
"""The failure category of a run that no fleet can take."""
FLEET_FILE = "type: fleet\nname: machines\nnodes: 0..2\nidle_duration: 10m"
"""A fleet of any machine that is on offer, at most two."""
FROM_CODE = "client.fleets.apply(...)"
"""What creates a fleet with this package alone."""


def fleet_advice(from_code: str = FROM_CODE) -> str:
    """Return both ways to a fleet, in several lines, without a full stop.

    Args:
        from_code: What creates a fleet from code, in the caller's words.
    """
    lines = "".join(f"\n  {line}" for line in FLEET_FILE.splitlines())
    return (
        f"Create a fleet with `dstack apply -f fleet.dstack.yml` and this file:{lines}\n"
        f"Or create it from code with {from_code}"
    )


def no_fleet_hint(project: str, fleets: int) -> str:
    """Return the sentence of a plan on a project whose fleets offer no machine.

    Args:
        project: The project's name.
        fleets: How many fleets it has.
    """
    if fleets:
        has = "its fleet offers" if fleets == 1 else f"none of its {fleets} fleets offers"
        no = "no machine" if fleets == 1 else "a machine"
        return f"Project {project}: {has} {no} for this run. {fleet_advice()}."
    return f"Project {project} has no fleet, and a run needs one since dstack 0.20. {fleet_advice()}."


def plan_hints(plan: Plan, *, fleet_option: str = FROM_CODE) -> str:
    """Return the hints of a plan as one text, empty if it has none.

    Args:
        plan: What ``runs.plan`` returned.
        fleet_option: The engine's name of what creates a fleet, such as ``"dstack_fleet"``.

    Example:
        ``logger.warning("No machine is on offer. %s", plan_hints(plan, fleet_option="dstack_fleet"))``
    """
    return " ".join(plan.hints).replace(FROM_CODE, fleet_option)
