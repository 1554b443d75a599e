"""How many machines a run spec takes at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def most_machines(spec: Mapping[str, Any]) -> int:
    """Return how many machines the nodes of a task, or the replicas of a service, take at most."""
    configuration = spec["configuration"]
    groups = configuration.get("groups")
    if not isinstance(groups, list):
        groups = configuration.get("replicas")
    if isinstance(groups, list):
        # The key of a group's number depends on the kind of the configuration.
        return sum(_most(_number(group)) for group in groups) or 1
    return _most(configuration.get("nodes")) * _most(groups)


def _number(group: Any) -> Any:
    if not isinstance(group, Mapping):
        return None
    return next((group[key] for key in ("nodes", "count", "replicas") if key in group), None)


def _most(number: Any) -> int:
    """Return the upper end of a number or range such as 2, ``"1..4"`` or ``{"min": 1, "max": 4}``."""
    if isinstance(number, Mapping):
        number = number.get("max", number.get("min"))
    if isinstance(number, str):
        low, dots, high = number.partition("..")
        number = high or low if dots else number
    try:
        return max(1, int(number))
    except (TypeError, ValueError):
        return 1
