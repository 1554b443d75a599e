"""A journal of the metrics that Airflow's processes receive; real components import it.

The problem: Airflow keeps the last value of a metric, so nothing in Airflow shows whether an earlier message
arrived, or arrived twice.

The idea: the operator and trigger of this module append each metric to a file before the provider keeps it.
One unbuffered write does it, which a ``kill -9`` cannot take back. Each entry has what its receiver started
with, which is what Airflow had kept of the messages before.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airflow_provider_dstack._run_reports import METRICS_KEY, Record, RunReports
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import Reported

# In the AIRFLOW_HOME.
NAME = "report-journal"
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Receipt:
    """One metric that one receiver in one process received; times in seconds since the epoch.

    ``since`` is the step of the last metric in the state that the receiver started with, 0 without one.
    ``case`` and ``sent`` are from the message.
    """

    receiver: str
    since: int
    case: int
    step: int
    sent: float
    at: float


def receipts(home: Path, case: int) -> list[Receipt]:
    """Return what was received of one test's run, in the order in which it was received."""
    path = home / NAME
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be half written.
    found = (Receipt(**json.loads(line)) for line in lines if line.endswith("\n"))
    return [one for one in found if one.case == case]


class _JournalledReports(RunReports):
    def __init__(self, state: Mapping[str, Any] | None = None, *arguments: Any, **options: Any) -> None:
        super().__init__(state, *arguments, **options)
        self._receiver = f"{os.getpid()}-{next(_NUMBERS)}"
        self._since = ((state or {}).get(METRICS_KEY) or {}).get("case", {}).get("step", 0)

    def take(self, event: Reported) -> Iterator[Record]:
        message = event.payload
        if event.kind == "metric" and "case" in message:
            numbers = {key: message[key] for key in ("case", "step", "sent")}
            _append(Receipt(self._receiver, self._since, at=time.time(), **numbers))
        yield from super().take(event)


def _append(receipt: Receipt) -> None:
    file = os.open(Path(os.environ["AIRFLOW_HOME"]) / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, (json.dumps(asdict(receipt)) + "\n").encode())
    finally:
        os.close(file)


class JournalledTrigger(DstackRunTrigger):
    """The provider's trigger; importing its module has installed the journal."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Name this class, so that a triggerer imports this module."""
        return f"{__name__}.{type(self).__name__}", super().serialize()[1]


class JournalledOperator(DstackRunOperator):
    """The provider's operator, which defers with a ``JournalledTrigger``."""

    def defer(self, *, trigger: Any, **options: Any) -> Any:
        """Defer with the same trigger, journalled."""
        return super().defer(trigger=JournalledTrigger(**trigger.serialize()[1]), **options)


def _install() -> None:
    """Let the provider's modules that receive messages use the journal, in this process."""
    from airflow_provider_dstack import _run_reports, _task_run, triggers

    for module in (_run_reports, _task_run, triggers):
        module.RunReports = _JournalledReports  # type: ignore[attr-defined]


_install()
