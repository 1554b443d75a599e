"""One attempt of a run, as an outcome lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from dstack_core.models.base import known_fields


@dataclass(frozen=True, slots=True)
class RunAttempt:
    """One attempt of a run: one submission of its job to a machine.

    Attributes:
        number: The attempt's number, counted from 1 as in logs (int). Attempts that found no machine have
            numbers, too, but are not listed.
        reason: Why it ended (str), in the server's own word; None while it runs.
        exit_status: What its command exited with (int), or None.
        cost: What it cost, in USD.
        duration: Seconds from its submission to its end, or None.
        instance: The type of its machine (str), or None.
        backend: The backend of its machine (str), or None.
        region: The region of its machine (str), or None.
        price_per_hour: The price of its machine in USD per hour, or None.
        spot: Whether it was a spot machine (bool), None if the server does not report it.
        node: The job's node, counted from 0.
        replica: The job's replica, counted from 0.

    Source: PROTOCOL 1.5.
    """

    number: int
    reason: str | None = None
    exit_status: int | None = None
    cost: float = 0.0
    duration: float | None = None
    instance: str | None = None
    backend: str | None = None
    region: str | None = None
    price_per_hour: float | None = None
    spot: bool | None = None
    node: int = 0
    replica: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` wrote, in this or another version."""
        return cls(**{"number": 0, **known_fields(cls, data)})


def describe_attempts(attempts: Any) -> str:
    """Return the attempts of a run in one line for a person; empty for a run of one attempt."""
    parts = []
    for one in attempts:
        node = f" node {one.node}" if one.node else ""
        where = f" on {one.instance}" if one.instance else ""
        parts.append(f"{one.number}{node}: {one.reason or 'running'}{where}, {one.cost:.4f} USD")
    return "; ".join(parts) if len({one.number for one in attempts}) > 1 else ""
