"""What a run spec has about the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core.models.options import duration_seconds


def retries_errors(spec: Mapping[str, Any]) -> bool:
    """Return whether the server starts a run again whose commands have failed (PROTOCOL 3.2)."""
    retry = spec["configuration"].get("retry")
    if retry is None:
        retry = spec["profile"].get("retry")
    if isinstance(retry, Mapping):
        # Without a list, dstack retries on every event.
        return "error" in (retry.get("on_events") or ["error"])
    return bool(retry)


def max_price(spec: Mapping[str, Any]) -> float | None:
    """Return the ``max_price`` of a run spec in USD per hour, None without one."""
    price = spec["configuration"].get("max_price")
    if price is None:
        price = spec["profile"].get("max_price")
    return price if isinstance(price, int | float) and not isinstance(price, bool) else None


def max_seconds(spec: Mapping[str, Any]) -> int | None:
    """Return the ``max_duration`` of a run spec in seconds; None without one, or if the server chooses it."""
    limit = spec["configuration"].get("max_duration")
    if limit is None:
        limit = spec["profile"].get("max_duration")
    if isinstance(limit, bool) or not isinstance(limit, int | str):
        return None
    try:
        return int(duration_seconds(limit)) or None
    except (ValueError, KeyError):
        # "off", and the older ways to write it.
        return None
