"""Count what a process holds, before and after work that must leave nothing behind."""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

# An upper bound for a busy machine; the wait returns as soon as nothing is left.
_SECONDS = 15.0
_POOLED = ("asyncio_", "AnyIO worker")


@dataclass(frozen=True)
class Held:
    """The number of open file descriptors, threads and processes, and the names of temporary files."""

    descriptors: int
    threads: int
    processes: int
    files: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        """Count, without what the garbage collector can free.

        The helper threads of running event loops, such as the embedded server's, do not count either: asyncio and
        anyio create a few when they need them, up to a bound, and end them with the loop.
        """
        gc.collect()
        me = psutil.Process()
        files = (str(path) for path in Path(tempfile.gettempdir()).rglob("*"))
        threads = [one for one in threading.enumerate() if not one.name.startswith(_POOLED)]
        return cls(me.num_fds(), len(threads), len(me.children(recursive=True)), frozenset(files))

    def exceeded_by(self, other: Held) -> list[str]:
        """Return what the other has more of."""
        more = [
            f"{name}: {getattr(other, name)} instead of {getattr(self, name)}"
            for name in ("descriptors", "threads", "processes")
            if getattr(other, name) > getattr(self, name)
        ]
        return more + sorted(other.files - self.files)[:10]


def assert_nothing_is_left(before: Held) -> None:
    """Fail if more is held than before; wait a while first, for the other side of a connection."""
    deadline = time.monotonic() + _SECONDS
    while (more := before.exceeded_by(Held.now())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not more, [*more, *sorted(one.name for one in threading.enumerate())]
