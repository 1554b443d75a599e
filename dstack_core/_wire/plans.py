"""Read the server's plans: the offers that a run would have (PROTOCOL 1.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core._wire.exact_sizes import exact_sizes
from dstack_core._wire.hardware import read_hardware
from dstack_core.models.plan import Offer, Plan


def parse_plan(data: Mapping[str, Any]) -> Plan:
    """Read the reply of ``runs/get_plan``; the first job speaks for all."""
    job = (data.get("job_plans") or [{}])[0]
    offers = tuple(parse_offer(item) for item in job.get("offers") or [])
    spec = job.get("job_spec") or {}
    return Plan(
        offers=offers,
        total_offers=int(job.get("total_offers") or len(offers)),
        max_price_per_hour=job.get("max_price"),
        hints=() if offers else exact_sizes(spec),
        # The server has merged the profile into it, and filled in the events (PROTOCOL 3.2).
        waits_for_capacity="no-capacity" in ((spec.get("retry") or {}).get("on_events") or ()),
    )


def parse_offer(data: Mapping[str, Any]) -> Offer:
    """Read one offer of a plan."""
    instance = data.get("instance") or {}
    hardware = read_hardware(instance.get("resources"))
    return Offer(
        backend=data["backend"],
        region=data["region"],
        instance=instance.get("name", ""),
        price_per_hour=float(data["price"]),
        spot=bool((instance.get("resources") or {}).get("spot")),
        availability=data.get("availability"),
        gpu=hardware.gpu,
        gpus=hardware.gpus,
        gpu_memory=hardware.gpu_memory,
    )
