"""What a run's events become in Airflow's log; the same for the worker and the triggerer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._frames import without_frames

if TYPE_CHECKING:
    from dstack_core import Event, LogLines
    from dstack_core.integration import LogRelay

# Of ``dstack_core.integration``, which a DAG file does not import; a test holds them equal.
DEFAULT_LOG_BUDGET = 10_000_000
# A record of its own reads best. A triggerer takes up to 0.5 ms of its loop for each: 16 ms for so many.
_FEW_LINES = 32


def new_relay(**options: Any) -> LogRelay:
    """Return the relay of one run; ``options`` are those of ``LogRelay``."""
    from dstack_core.integration import LogRelay, RecordLimits

    return LogRelay(limits=RecordLimits(few_lines=_FEW_LINES), **options)


def records(relay: LogRelay, event: Event) -> Iterator[tuple[int, str]]:
    """Yield ``(logging level, text)`` for an event, the outcome of the run included."""
    from dstack_core import LogLines, RunFinished
    from dstack_core.integration import describe_outcome

    yield from relay.records(_without_frames(event) if isinstance(event, LogLines) else event)
    if isinstance(event, RunFinished):
        yield logging.INFO, describe_outcome(event.outcome)


def _without_frames(event: LogLines) -> LogLines:
    """Return the event without what a function of ``@task.dstack`` returned."""
    lines = tuple(rest for line in event.lines if (rest := without_frames(line)) is not None)
    return event if lines == event.lines else replace(event, lines=lines)
