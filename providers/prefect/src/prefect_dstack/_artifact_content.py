"""The content of artifacts and assets: from what a run reports to what Prefect shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

Mask = Callable[[str], str]
"""What hides secrets in a text."""

# As many as an outcome has: a table of more names is nothing that a person reads.
_MOST_METRICS = 1000


class Metrics:
    """The last, lowest and highest value of each metric of a run."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, payload: Mapping[str, Any]) -> None:
        """Add the values of one message."""
        step = payload.get("step")
        for name, value in payload.items():
            if name == "step":
                continue
            if name not in self._rows and len(self._rows) >= _MOST_METRICS:
                continue
            number = float(value)
            row = self._rows.setdefault(name, {"name": name, **dict.fromkeys(("last", "step", "min", "max"))})
            row.update(last=number, step=step)
            # NaN is neither below nor above another number.
            if number == number:
                row["min"] = number if row["min"] is None else min(row["min"], number)
                row["max"] = number if row["max"] is None else max(row["max"], number)

    def table(self, mask: Mask) -> str:
        """Return the content of a table artifact; may be called while another thread adds."""
        rows = [dict(row) for row in list(self._rows.values())]
        return json.dumps(
            [
                {key: mask(value) if key == "name" else plain(value) for key, value in row.items()}
                for row in rows
            ]
        )


def table(columns: Iterable[str], rows: Iterable[list[Any]], mask: Mask) -> str:
    """Return the content of a table artifact."""
    from dstack_core.integration import mask_value

    names = list(_distinct(columns))
    return json.dumps([dict(zip(names, mask_value(row, mask), strict=True)) for row in rows])


def image(png: str, text: str) -> str:
    """Return an image in Markdown.

    Prefect's image artifact takes the address of an image, and shows a ``data:`` address as well, but prints
    all 350,000 characters of it below the image (seen in both UIs of 3.9.1).
    """
    return f"!{_in_brackets(text)}(data:image/png;base64,{png})"


def link(url: str, text: str) -> str:
    """Return a link in Markdown."""
    # Spaces and parentheses would end the address.
    return f"{_in_brackets(text)}({quote(url, safe='/:?#@!$&+,;=%~*[]')})"


def _in_brackets(text: str) -> str:
    shown = " ".join(text.split()).replace("[", "\\[").replace("]", "\\]")
    return f"[{shown}]"


def plain(value: Any) -> Any:
    """Return a number that JSON has: NaN and infinities become texts, others are rounded."""
    if not isinstance(value, float):
        return value
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    # Whole steps are reported as floats. The outcome has the values themselves.
    return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.8g}")


def emit_materialized(run_id: str, uri: str, metadata: dict[str, Any]) -> None:
    """Emit that an asset was materialized, as ``prefect.assets.materialize`` does; once per run and content.

    Raises ``ValueError`` for a URI that is not the key of an asset, and what Prefect raises.
    """
    from prefect.assets import Asset
    from prefect.events import emit_event

    key = Asset(key=uri).key
    content = json.dumps(metadata, sort_keys=True, default=str)
    emit_event(
        "prefect.asset.materialization.succeeded",
        resource={"prefect.resource.id": key},
        related=[{"prefect.resource.id": "dstack", "prefect.resource.role": "asset-materialized-by"}],
        payload=metadata,
        id=uuid5(NAMESPACE_URL, f"dstack.asset/{run_id}/{key}/{content}"),
    )


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """Yield names that differ: two columns of one name would be one in the table."""
    taken: set[str] = set()
    for name in names:
        number, shown = 1, name
        while shown in taken:
            number += 1
            shown = f"{name} ({number})"
        taken.add(shown)
        yield shown
