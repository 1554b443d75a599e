"""Call user code on what happens to a run, so that it can neither delay nor fail the task that follows it.

The problem: a callback may be slow, hang or raise. The task that follows the run must continue, in an event
loop or in a thread, and a deferred task is followed by several processes, which cannot pass an object on.

The idea: ``CallbackNotifier`` maps the events of ``run.follow()`` to calls and puts these into a queue. A
thread that lives while there is something in the queue makes the calls, one after the other. What is called
is a class that each process imports by its path.

Invariants:
  * The calls of one run are made in the order of its events, never two at a time.
  * Which calls are made depends on the events alone, so their position (``progress``) is that of the calls,
    too: a process that continues from it repeats none. One that is killed may not have saved its latest
    position, so that calls since then are made again: at least once.
  * ``submitted`` is called once in each process that submits or takes over the run, and once for a status
    that the run already has then.
  * A queue that is full drops log lines and metrics, and reports that; the other calls are never dropped.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dstack_core import clock
from dstack_core.integration.masking import mask_result
from dstack_core.models.callbacks import CALLBACK_EVENTS, CallbackEvent, name_of
from dstack_core.models.events import Event, LogLines, Reported, RunFinished, StatusChanged

if TYPE_CHECKING:
    from dstack_core.aio_run import AsyncRun
    from dstack_core.models.outcome import Outcome
    from dstack_core.models.progress import Progress
    from dstack_core.run import Run


# The events that are named after a status; ``submitted`` comes from the submit itself.
_OF_STATUS = frozenset(CALLBACK_EVENTS) - {"submitted"}
# Batches that wait for a slow callback. A batch is up to a page of the log, so more would fill the memory of
# a process that follows many runs; fewer drops lines where a callback only pauses for some seconds.
_LONGEST_QUEUE = 200
# How long the end of a task waits for callbacks that are still busy. Less drops the last notification of a
# slow chat server; more delays every task whose callback hangs.
DRAIN_SECONDS = 30.0
_TICK_SECONDS = 0.05


# What is known of a run that calls nothing.
_UNKNOWN = CallbackEvent("", "", "", "", "", "")


class CallbackNotifier:
    """The calls of user code for one run.

    Args:
        callbacks: Instances with methods of ``RunCallbacks``; without any, nothing costs anything.
        log: A logger with ``warning``.
        mask: Hides secrets in a text; also an attribute, which may be replaced. Default: nothing is hidden.
        source: What follows the run; see ``CallbackEvent``.
        longest_queue: How many calls wait at most before log lines and metrics are dropped.

    Example::

        notifier = CallbackNotifier(load_callbacks(callbacks), log=logger)
        notifier.submitted(run)
        for event in run.follow():
            notifier.handle(event)
        notifier.drain()
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        *,
        log: Any,
        mask: Callable[[str], str] = str,
        source: Mapping[str, str] | None = None,
        longest_queue: int = _LONGEST_QUEUE,
    ) -> None:
        self._callbacks = list(callbacks)
        self._log = log
        self.mask = mask
        self._known = replace(_UNKNOWN, source=dict(source or {})) if callbacks else _UNKNOWN
        self._longest_queue = longest_queue
        # Most tasks have no callbacks: an empty list is small, unlike a deque or a set.
        self._queue: list[tuple[Any, CallbackEvent]] = []
        self._lock = threading.Lock()
        self._is_working = False
        self._dropped = False
        self._warned: list[tuple[str, str]] = []

    def __bool__(self) -> bool:
        """Whether anything is called at all."""
        return bool(self._callbacks)

    def follows(self, run: Run | AsyncRun, project: str, *, is_taken_over: bool = False) -> None:
        """Note which run it is, for a process that continues to follow it."""
        if not self._callbacks:
            return
        self._known = replace(
            self._known,
            run_name=run.name,
            run_id=run.id,
            url=run.url,
            project=project,
            status=str(run.last_status),
            is_taken_over=is_taken_over,
        )

    def submitted(
        self,
        run: Run | AsyncRun,
        project: str,
        *,
        progress: Progress | None = None,
        is_taken_over: bool = False,
    ) -> None:
        """Call ``on_submitted``, and what belongs to the status in ``progress``.

        ``progress`` is where the run is followed from: ``follow`` does not report the status in it.
        """
        if not self._callbacks:
            return
        self.follows(run, project, is_taken_over=is_taken_over)
        self._post("submitted")
        if progress is not None and progress.status in _OF_STATUS:
            self._post(progress.status)

    def handle(self, event: Event) -> None:
        """Call what belongs to an event of ``run.follow()``; does not wait for it."""
        if not self._callbacks:
            return
        match event:
            case StatusChanged(status=status, message=message):
                self._known = replace(
                    self._known,
                    status=str(status),
                    message=None if message is None else self.mask(message),
                )
                if status in _OF_STATUS:
                    self._post(str(status))
            case LogLines(lines=lines) if lines:
                # In one piece: masking line by line would miss a secret of several lines.
                text = tuple(self.mask("\n".join(lines)).split("\n"))
                self._post("log_lines", lines=text, node=event.node, replica=event.replica)
            case Reported(kind="metric", payload=payload):
                metrics = {name: value for name, value in payload.items() if name != "step"}
                where = {"node": event.node, "replica": event.replica}
                self._post("metric", metrics=metrics, step=payload.get("step"), **where)
            case RunFinished(outcome=outcome):
                self.ended(outcome)

    def ended(self, outcome: Outcome) -> None:
        """Call ``on_ended``; for a process that has the outcome alone."""
        if not self._callbacks:
            return
        outcome = mask_result(outcome, self.mask, _ignore)
        self._known = replace(
            self._known,
            run_name=outcome.run_name,
            run_id=outcome.run_id,
            project=outcome.project,
            url=outcome.url,
            status=str(outcome.status),
        )
        self._post("ended", outcome=outcome)

    @property
    def is_idle(self) -> bool:
        """Whether all calls have returned."""
        with self._lock:
            return not self._is_working

    def drain(self, seconds: float = DRAIN_SECONDS, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until all calls have returned, ``seconds`` at most; then one warning. ``sleep`` may raise."""
        for pause in self.pauses(seconds):
            sleep(pause)

    def is_waited_for(self, since: float) -> bool:
        """Whether a wait for the calls that began at ``since`` (``clock.monotonic()``) continues."""
        return not self.is_idle and clock.monotonic() < since + DRAIN_SECONDS

    def pauses(self, seconds: float = DRAIN_SECONDS, *, since: float | None = None) -> Iterator[float]:
        """Yield how long to sleep until all calls have returned, as ``drain`` does; for async code.

        ``since`` (``clock.monotonic()``) is when the wait began, by default now.
        """
        end = seconds + (clock.monotonic() if since is None else since)
        while not self.is_idle:
            if clock.monotonic() >= end:
                self._log.warning(
                    "A callback of run %s has not returned for %.0f s. The task does not wait for it.",
                    self._known.run_name,
                    seconds,
                )
                return
            yield _TICK_SECONDS

    def _post(self, kind: str, **more: Any) -> None:
        event = replace(self._known, kind=kind, **more)
        with self._lock:
            if len(self._queue) >= self._longest_queue and kind in ("log_lines", "metric"):
                is_first, self._dropped = not self._dropped, True
                if is_first:
                    self._log.warning(
                        "Callbacks of run %s are slower than its log. Some log lines or metrics are not "
                        "passed to them.",
                        event.run_name,
                    )
                return
            self._queue.extend((callback, event) for callback in self._callbacks)
            if self._is_working:
                return
            self._is_working = True
        # The copied context is that of the task: its logger, and what it traces.
        work = partial(contextvars.copy_context().run, self._work)
        try:
            threading.Thread(target=work, name="dstack-callbacks", daemon=True).start()
        except RuntimeError as error:
            # The process has no thread left; the next event tries again, with what waits in the queue.
            with self._lock:
                self._is_working = False
            self._log.warning("Could not call the callbacks of run %s: %s.", event.run_name, error)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._is_working = False
                    return
                callback, event = self._queue.pop(0)
            self._call(callback, event)

    def _call(self, callback: Any, event: CallbackEvent) -> None:
        try:
            # A property of user code may raise, too.
            method = getattr(callback, f"on_{event.kind}", None)
            if method is not None:
                method(event)
        except BaseException as error:
            # Also SystemExit: whatever user code does here, the task continues.
            key = (name_of(callback), event.kind)
            if key not in self._warned:
                self._warned.append(key)
                self._log.warning(
                    "%s.on_%s raised %s. The task is not affected; further errors of it are not logged.",
                    *key,
                    self.mask(_text_of(error)),
                )


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        # An error whose text cannot be made must not end the thread.
        return type(error).__name__


def _ignore(*text: object) -> None:
    """Leave the warning that a result was masked to the host, which masks the result, too."""
