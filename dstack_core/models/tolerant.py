"""Read values that another version of this package wrote.

Progress and outcomes cross processes: a worker and a triggerer, two executions of a flow. While a deployment
is updated these run different versions, and neither may fail a task over a field that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known_fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``data`` that are fields of the dataclass ``kind``."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
