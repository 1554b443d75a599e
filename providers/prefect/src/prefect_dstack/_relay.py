"""Bring a run's events into the run logger."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prefect_dstack._secrets import Hider

if TYPE_CHECKING:
    from dstack_core import Event, LogLines, Outcome, Progress

MAX_RECORD_LINES = 200
MAX_RECORD_CHARS = 16_000
# Prefect Cloud refuses a record above 25,000 characters, and with it the whole batch.
MAX_LINE_CHARS = 24_000
TAIL_LINES = 20
_WARN_EVERY = 60.0
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_REFUSED = {code: "\ufffd" for code in range(32) if chr(code) != "\t"}


class Relay:
    """The log of a run in the run logger, and what is known of the run.

    ``logger`` is taken in the task, where the context is. ``stream_logs`` (bool): the log lines are relayed;
    the last ones are kept in any case. ``relayed`` counts the lines that were logged before the run was
    followed again from its first line. ``hider`` knows the secrets. ``progress`` is the position in the run
    and its log, ``outcome`` the run's end, both None until known.
    """

    def __init__(self, logger: Any, *, stream_logs: bool, relayed: Counter[str] | None = None) -> None:
        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._logger = logger
        self.stream_logs = stream_logs
        self._last_warning: float | None = None
        self._relayed = relayed or Counter()
        self.hider = Hider()

    def handle(self, event: Event) -> None:
        """Log one event and remember the position behind it."""
        from dstack_core import LogLines, RunFinished, StatusChanged

        if isinstance(event, LogLines):
            self._lines(event)
        elif isinstance(event, StatusChanged):
            message = f" ({event.message})" if event.message else ""
            self._logger.info("Run %s: %s%s", event.progress.run_name, event.status, message)
        elif isinstance(event, RunFinished):
            self.outcome = event.outcome
        else:
            self.handle_contact(event)
        self.progress = event.progress

    def handle_contact(self, event: Event) -> None:
        """Log that the server became unreachable or answers again; events of a submission, too."""
        from dstack_core import ContactLost, ContactRestored

        if isinstance(event, ContactLost):
            self._contact_lost(event.error, event.silent_for, event.gives_up_in)
        elif isinstance(event, ContactRestored):
            self._last_warning = None
            self._logger.info("The dstack server answers again after %.0f s.", event.silent_for)

    def _lines(self, event: LogLines) -> None:
        # Only further nodes and replicas are named: most runs have one job.
        job = f"[{event.replica}/{event.node}] " if event.replica or event.node else ""
        lines = [job + clean(self.hider.hide(line)) for line in event.lines]
        self.tail.extend(lines)
        if self.stream_logs:
            for record in records([line for line in lines if not self._was_relayed(line)]):
                self._logger.info("%s", record)

    def _was_relayed(self, line: str) -> bool:
        if self._relayed[line] <= 0:
            return False
        self._relayed[line] -= 1
        return True

    def _contact_lost(self, error: str, silent_for: float, gives_up_in: float) -> None:
        if self._last_warning is None or silent_for - self._last_warning >= _WARN_EVERY:
            self._last_warning = silent_for
            # Before the submission there is no run yet, afterwards it keeps running: nothing is said of it.
            self._logger.warning("%s. Retrying for another %.0f s.", error.rstrip("."), gives_up_in)


def clean(line: str) -> str:
    """Return ``line`` without terminal escapes and control characters, cut where Prefect needs it."""
    text = _ESCAPES.sub("", line).translate(_REFUSED)
    if len(text) <= MAX_LINE_CHARS:
        return text
    return f"{text[:MAX_LINE_CHARS]} [... {len(text) - MAX_LINE_CHARS} characters cut]"


def records(lines: Iterable[str]) -> Iterator[str]:
    """Join lines into few log records: one record per line would overload the Prefect server.

    A record holds at most ``MAX_RECORD_LINES`` lines and ``MAX_RECORD_CHARS`` characters, or one line.
    """
    held: list[str] = []
    size = 0
    for line in lines:
        if held and (len(held) >= MAX_RECORD_LINES or size + len(line) >= MAX_RECORD_CHARS):
            yield "\n".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line) + 1
    if held:
        yield "\n".join(held)
