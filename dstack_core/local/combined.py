"""What a fleet allows and a job requests, combined as on the real server: the intersection of both."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dstack_core.local.quantities import GPUSpec, ResourcesSpec


class CannotCombineError(Exception):
    """A fleet and a job that exclude each other."""


def combine_resources(fleet: ResourcesSpec | None, job: ResourcesSpec) -> ResourcesSpec:
    """Return what meets both; raises CannotCombineError if nothing does."""
    if fleet is None:
        return job
    one, other = fleet.model_dump(), job.model_dump()
    both = {
        "cpu": {
            "arch": _either(one["cpu"]["arch"], other["cpu"]["arch"]),
            "count": _range(one["cpu"]["count"], other["cpu"]["count"]),
        },
        "memory": _range(one["memory"], other["memory"]),
        "shm_size": other["shm_size"],
        "gpu": _gpu(fleet.gpu, job.gpu),
        "disk": None,
    }
    if one["disk"] is not None or other["disk"] is not None:
        both["disk"] = {"size": _range((one["disk"] or {}).get("size"), (other["disk"] or {}).get("size"))}
    try:
        return ResourcesSpec.model_validate(both)
    except ValidationError as error:
        raise CannotCombineError from error


def combine_spot(fleet: bool | None, job: bool | None) -> bool | None:
    """Return whether a spot machine is wanted (None: either); raises CannotCombineError for opposites."""
    wanted: bool | None = _either(fleet, job)
    return wanted


def _either(one: Any, other: Any) -> Any:
    if one is not None and other is not None and one != other:
        raise CannotCombineError
    return other if one is None else one


def _range(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    if one is None or other is None:
        return other if one is None else one
    lows = [low for low in (one["min"], other["min"]) if low is not None]
    highs = [high for high in (one["max"], other["max"]) if high is not None]
    return {"min": max(lows, default=None), "max": min(highs, default=None)}


def _gpu(fleet: GPUSpec | None, job: GPUSpec | None) -> Any:
    if fleet is None or job is None:
        return None if fleet is job else (fleet or job)
    one, other = fleet.model_dump(), job.model_dump()
    return {
        "vendor": _either(one["vendor"], other["vendor"]),
        "name": _names(fleet.name, job.name),
        "compute_capability": one["compute_capability"] or other["compute_capability"],
        **{key: _range(one[key], other[key]) for key in ("count", "memory", "total_memory")},
    }


def _names(one: list[str] | None, other: list[str] | None) -> list[str] | None:
    if not one or not other:
        return one or other
    kept = [name for name in one if name.upper() in [each.upper() for each in other]]
    if not kept:
        raise CannotCombineError
    return kept
