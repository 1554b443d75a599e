"""The GPUs on offer, grouped as by gpus/list."""

from __future__ import annotations

from typing import Any

from dstack_core.local.bodies import ListGpusRequest
from dstack_core.local.inventory import Inventory, Where
from dstack_core.local.locations import Location


def gpu_groups(inventory: Inventory, request: ListGpusRequest) -> list[dict[str, Any]]:
    """Return the only kind of GPU as the groups of gpus/list; no group if the requirements exclude it."""
    spec = request.run_spec
    resources = spec.configuration.resources
    wanted = Where(spec.setting("backends"), spec.setting("regions"), spec.setting("max_price"))
    places = inventory.places(wanted)
    if not inventory.gpus or not places or not inventory.fits(resources):
        return []
    count = {"min": max(1, inventory.wanted_gpus(resources)), "max": inventory.gpus}
    if resources.gpu is not None and resources.gpu.count.max is not None:
        count["max"] = min(count["max"], resources.gpu.count.max)
    group_by = request.group_by or []
    counts = range(count["min"], count["max"] + 1) if "count" in group_by else []
    return [
        _group(inventory, group, of, group_by)
        for group in _grouped(places, group_by)
        for of in ([{"min": number, "max": number} for number in counts] or [count])
    ]


def _grouped(places: list[Location], group_by: list[Any]) -> list[list[Location]]:
    """Return the places of each group, cheapest first."""
    groups: dict[tuple[str, str], list[Location]] = {}
    for place in places:
        key = (place.backend if "backend" in group_by else "", place.region if "region" in group_by else "")
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _group(
    inventory: Inventory, places: list[Location], of: dict[str, int], group_by: list[Any]
) -> dict[str, Any]:
    low, high = min(one.price for one in places), max(one.price for one in places)
    return {
        "name": inventory.gpu_name,
        "memory_mib": int(inventory.gpu_memory * 1024),
        "vendor": "nvidia",
        "availability": ["available"],
        "spot": ["on-demand"],
        "count": of,
        # A job costs the same, however many GPUs it uses.
        "price": {"min": low / of["max"], "max": high / of["min"]},
        "offer_price": {"min": low, "max": high},
        "backends": None if "backend" in group_by else list(dict.fromkeys(one.backend for one in places)),
        "backend": places[0].backend if "backend" in group_by else None,
        "regions": None if "region" in group_by else list(dict.fromkeys(one.region for one in places)),
        "region": places[0].region if "region" in group_by else None,
    }
