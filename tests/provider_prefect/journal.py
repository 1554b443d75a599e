"""Callbacks that keep what they were called with, for all instances of this process."""

from __future__ import annotations

from typing import ClassVar

from dstack_core import CallbackEvent, RunCallbacks


class Journal(RunCallbacks):
    """Keeps the events that every run has; one of the embedded server may pass the others between two polls."""

    events: ClassVar[list[CallbackEvent]] = []

    def note(self, event: CallbackEvent) -> None:
        self.events.append(event)

    on_submitted = on_log_lines = on_metric = on_ended = note


class FullJournal(Journal):
    """Keeps all events."""

    on_provisioning = on_running = Journal.note


JOURNAL = f"{__name__}.Journal"
FULL_JOURNAL = f"{__name__}.FullJournal"
