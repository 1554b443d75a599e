"""Keep how far a deferred run was followed, so that another triggerer goes on right behind it.

Airflow makes a trigger again from its first arguments, so what was relayed since would be relayed again.
The place is kept in an XCom of the task, the one store that triggers can write to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import delete_xcom, pull_xcom, push_xcom
from airflow_provider_dstack._log_position import place
from airflow_provider_dstack._pace import Pace

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from airflow_provider_dstack._compat import TaskInstanceLike

KEY = "dstack_progress"
SECONDS_BETWEEN = 10.0
# A write takes a triggerer tens of milliseconds, in which it serves nobody else.
_REST_FACTOR = 4
# A killed triggerer, and a trigger that has ended, lose the records that are still in the pipe to Airflow's
# supervisor. It reads 4 KiB of log for each request that it answers (Airflow 3.2, 3.3), and the pipe holds
# 208 KiB (Linux); a tenth more is for what surrounds the records.
_READ_BYTES = 4096
_PIPE_BYTES = 230_000
# What waits to be saved is told twice should the triggerer die: few tasks are not to wait for each other.
_REST = Pace(burst_seconds=5.0)


class Checkpoints:
    """Have the state of a watch kept when it is new, ten seconds after the last time at the earliest.

    ``start_save`` begins to save a state and returns the future of that; ``first`` is the state that is kept
    already. New is what was read of the log: a status that is told twice does no harm. What happens after
    the last save is relayed again when the triggerer dies.
    """

    def __init__(
        self,
        start_save: Callable[[dict[str, Any]], Future[None] | asyncio.Future[None]],
        first: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start_save = start_save
        self._clock = clock
        self._saved = place(first)
        self._saving: Future[None] | asyncio.Future[None] | None = None
        self._next = clock()

    def offer(self, state: Callable[[], dict[str, Any]]) -> bool:
        """Save what ``state`` returns if it is time to and if it is new; does not wait.

        Tells whether that is all: False asks for another offer later.
        """
        if self._clock() < self._next or not (self._saving is None or self._saving.done()):
            return False
        now = state()
        if place(now) == self._saved:
            return True
        self._saved = place(now)
        self._next = self._clock() + SECONDS_BETWEEN
        self._saving = self._start_save(now)
        return True

    def last(self, state: dict[str, Any]) -> Future[None] | asyncio.Future[None] | None:
        """Save ``state`` at once if it is new, and close; return the future of what is saved last, if any."""
        if place(state) != self._saved:
            self.close()
            self._saved = place(state)
            self._saving = self._start_save(state)
        last, self._saving = self._saving, None
        return last

    def close(self) -> None:
        """Give up a save that has not begun."""
        if self._saving is not None:
            self._saving.cancel()


def save(ti: TaskInstanceLike, marker: str, state: Mapping[str, Any]) -> None:
    """Keep ``state`` (JSON-plain) for the try that ``marker`` names. Blocks; raises what Airflow raises."""
    push_xcom(ti, KEY, {"marker": marker, **state})


def log_requests(recent_bytes: float) -> int:
    """Return the number of requests behind which Airflow has read what was logged before them."""
    return int(min(recent_bytes, _PIPE_BYTES) / _READ_BYTES)


def save_and_rest(
    ti: TaskInstanceLike, marker: str, state: Mapping[str, Any], recent_bytes: float = 0.0
) -> None:
    """Do ``save`` and wait four times as long; a few saves after a quiet time do not wait.

    In a thread that all triggers share this takes the triggerer a fifth of its time at most, however many
    tasks are deferred. Behind ``recent_bytes`` of log it first lets Airflow read them: a position that is
    saved before its lines would lose them.
    """
    for _ in range(log_requests(recent_bytes)):
        pull_xcom(ti, KEY)
    started = time.monotonic()
    try:
        save(ti, marker, state)
    finally:
        time.sleep(_REST.wait_after(_REST_FACTOR * (time.monotonic() - started)))


def load(ti: TaskInstanceLike, marker: str) -> dict[str, Any] | None:
    """Return what the same try kept last, or None. Blocks; raises what Airflow raises."""
    found = pull_xcom(ti, KEY)
    if not isinstance(found, Mapping) or found.get("marker") != marker:
        # A trigger of an earlier try may write after this one began: XComs know no tries.
        return None
    return {name: value for name, value in found.items() if name != "marker"}


def forget(ti: TaskInstanceLike) -> None:
    """Remove what was kept, once nobody can need it. Blocks; raises what Airflow raises."""
    delete_xcom(ti, KEY)
