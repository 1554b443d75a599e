"""Callbacks that append each call to a file, for tests of processes that are killed; the processes import it.

One unbuffered write for each call, which a ``kill -9`` cannot take back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstack_core import CallbackEvent, RunCallbacks

# The variable of the environment that names the file.
VARIABLE = "CALLBACK_JOURNAL"


@dataclass(frozen=True)
class Call:
    """One call of a callback, and the process in which it was made."""

    kind: str
    run_name: str
    process: int
    is_taken_over: bool
    lines: Sequence[str]


class Journal(RunCallbacks):
    """Callbacks that note each call in the file; without one, nothing."""

    def _note(self, event: CallbackEvent) -> None:
        if not (path := os.environ.get(VARIABLE)):
            return
        call = {
            "kind": event.kind,
            "run_name": event.run_name,
            "process": os.getpid(),
            "is_taken_over": event.is_taken_over,
            "lines": list(event.lines),
        }
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, (json.dumps(call) + "\n").encode())
        finally:
            os.close(file)

    on_submitted = on_provisioning = on_running = on_log_lines = on_metric = on_ended = _note


def calls(path: Path, run_name: str) -> list[Call]:
    """Return the calls for a run, in the order in which they were made."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be half written.
    found = (Call(**json.loads(line)) for line in lines if line.endswith("\n"))
    return [one for one in found if one.run_name == run_name]


def count(found: Sequence[Call], kind: str) -> int:
    """Return how many calls are of a kind."""
    return sum(one.kind == kind for one in found)


def lines_of(found: Sequence[Call]) -> list[str]:
    """Return the log lines that were passed to the callbacks."""
    return [line for one in found for line in one.lines]
