"""What a run reports beside its log: the kinds of messages, their payloads, and the limits on them.

A run writes a message as a line on its stdout (``docs/report-protocol.md``). This file knows what a message
may hold, not how it is written.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstack_core.errors import ConfigurationError
from dstack_core.models.debug import HELD, RELEASED, is_held, is_released

# Bytes of a message. A result of this size is three hundred parts in the log; a larger one holds up the log
# behind it, and belongs on a volume or in a bucket.
DEFAULT_MAX_BYTES = 1024 * 1024
# Messages kept of one second. A training that reports each step stays far below it; hosts write what they
# keep to a database.
DEFAULT_PER_SECOND = 1000
# Bytes of an image: Airflow and Prefect keep it in their databases.
MAX_IMAGE_BYTES = 256 * 1024
# Metrics of one run whose last value is kept with the position in the log, which rides on every event.
MAX_METRICS = 1000
# Kinds that are rare and that a caller waits for; a flood of metrics never drops them.
KEPT_KINDS = frozenset({"result", "checkpoint", "asset", "skip", "function", HELD, RELEASED})

_NOT_FINITE = ("nan", "inf", "-inf")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class ReportLimits:
    """The limits on what a run reports; what exceeds them is dropped with a warning.

    Args:
        max_bytes: Most bytes of a message, 64 or more.
        per_second: Most messages of one job that are kept per second, 1 or more. Results, checkpoints and
            assets are always kept.

    Raises:
        ConfigurationError: A limit is not a whole number in range.
    """

    max_bytes: int = DEFAULT_MAX_BYTES
    per_second: int = DEFAULT_PER_SECOND

    def __post_init__(self) -> None:
        """Raise ``ConfigurationError`` for limits that no message meets."""
        for name, least in (("max_bytes", 64), ("per_second", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}: expected a whole number from {least} on, got {value!r}.")


def payload_of(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload of a message of that kind; one of an unknown kind is returned as it came.

    Raises ``ValueError`` for a payload that does not fit its kind.
    """
    check = _CHECKS.get(kind)
    if check is not None and not check(fields):
        raise ValueError(f"{kind}: expected the keys of that kind, got {sorted(fields)}.")
    return dict(fields)


def metric_values(payload: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a ``metric`` message as floats, NaN and infinities included."""
    return {name: float(value) for name, value in payload.items() if name != "step"}


def plain_number(value: float) -> float | str:
    """Return a number as JSON has it: NaN and infinities, which it lacks, become ``"nan"``, ``"inf"``."""
    return value if math.isfinite(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_float(value)


def _is_float(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_metric(fields: Mapping[str, Any]) -> bool:
    step = fields.get("step")
    values = [value for name, value in fields.items() if name != "step"]
    return (
        bool(values)
        and (step is None or _is_number(step))
        and all(_is_number(value) or (isinstance(value, str) and value in _NOT_FINITE) for value in values)
    )


def _is_progress(fields: Mapping[str, Any]) -> bool:
    if not isinstance(fields.get("text", ""), str | None):
        return False
    if "value" in fields:
        return _is_number(fields["value"]) and 0 <= fields["value"] <= 1
    done, total = fields.get("done", -1), fields.get("total", 0)
    return bool(_is_number(done) and _is_number(total) and done >= 0 and total > 0)


def _is_table(fields: Mapping[str, Any]) -> bool:
    columns, rows = fields.get("columns"), fields.get("rows")
    return (
        isinstance(fields.get("name"), str)
        and isinstance(columns, list)
        and all(isinstance(column, str) for column in columns)
        and isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    )


def _is_link(fields: Mapping[str, Any]) -> bool:
    return _has_text("url")(fields) and isinstance(fields.get("text"), str | None)


def _is_image(fields: Mapping[str, Any]) -> bool:
    png = fields.get("png")
    if not isinstance(fields.get("name"), str) or not isinstance(png, str):
        return False
    if not isinstance(fields.get("text"), str | None):
        return False
    try:
        data = base64.b64decode(png, validate=True)
    except (binascii.Error, ValueError):
        return False
    return data.startswith(_PNG) and len(data) <= MAX_IMAGE_BYTES


def _has_text(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: isinstance(fields.get(name), str) and bool(fields[name])


def _has_metadata(name: str) -> Callable[[Mapping[str, Any]], bool]:
    has_text = _has_text(name)
    return lambda fields: has_text(fields) and isinstance(fields.get("metadata", {}), Mapping | None)


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "result": lambda fields: "value" in fields,
    "metric": _is_metric,
    "progress": _is_progress,
    "table": _is_table,
    "link": _is_link,
    "image": _is_image,
    "asset": _has_metadata("uri"),
    "checkpoint": _has_metadata("path"),
    "skip": lambda fields: isinstance(fields.get("reason"), str),
    HELD: is_held,
    RELEASED: is_released,
}
