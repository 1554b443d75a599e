"""A run that writes 10 MB a second: every line once, in order, and the reader's memory stays small."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dstack_core as dstack
from dstack_core import Client
from tests.faults import loud_job
from tests.local.server_process import serving_apart

PACE = 10_000_000
# A page has at most 1,000 messages of 64 KiB, which a reader gets if a busy machine delayed it. As text, base64,
# parsed, joined and split it takes eight times as much. A reader that kept a minute of the log would need more than
# twice that.
MOST_MEMORY = 8 * 1000 * 64 * 1024
SECONDS = pytest.mark.parametrize(
    "seconds", [5, pytest.param(60, marks=[pytest.mark.endurance, pytest.mark.timeout(600)])]
)


@pytest.fixture(scope="module")
def apart() -> Iterator[dict[str, Any]]:
    """Serve from another process, so that the memory of this one is only the reader's."""
    with serving_apart() as arguments:
        yield arguments


class LineChecker:
    """A reader that checks each line as it comes, keeps none, and records the peak of its memory."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self._before = self._me.memory_info().rss
        self.lines = 0
        self.grown = 0
        self.last_line = ""

    def check(self, event: dstack.Event) -> None:
        """Check the lines of an event."""
        if isinstance(event, dstack.LogLines):
            for line in event.lines:
                if self.last_line or line != (loud_job.LINE % self.lines)[:-1]:
                    assert not self.last_line, f"{line!r} behind the end"
                    self.last_line = line
                else:
                    self.lines += 1
            self.grown = max(self.grown, self._me.memory_info().rss - self._before)


def follow(arguments: dict[str, Any], task: dict[str, Any], checker: LineChecker) -> None:
    with Client(**arguments) as client:
        for event in client.runs.submit(task).follow(poll_interval=0.2):
            checker.check(event)


def following(
    kind: type[dstack.AsyncClient],
) -> Callable[[dict[str, Any], dict[str, Any], LineChecker], None]:
    async def go(arguments: dict[str, Any], task: dict[str, Any], checker: LineChecker) -> None:
        async with kind(**arguments) as client:
            async for event in (await client.runs.submit(task)).follow(poll_interval=0.2):
                checker.check(event)

    return lambda arguments, task, checker: asyncio.run(go(arguments, task, checker))


WAYS = {
    "sync": follow,
    "async": following(dstack.AsyncClient),
    "shared": following(dstack.SharedAsyncClient),
}


@SECONDS
@pytest.mark.parametrize("way", WAYS)
def test_ten_megabytes_a_second_arrive_whole(
    apart: dict[str, Any], way: str, seconds: int, record_property: Callable[[str, object], None]
) -> None:
    job = f"{sys.executable} {Path(loud_job.__file__)} {seconds} {PACE}"
    checker = LineChecker()
    began = time.monotonic()
    WAYS[way](apart, {"type": "task", "commands": [job]}, checker)
    took = time.monotonic() - began
    assert checker.lines == seconds * PACE // 100
    wrote = re.fullmatch(r"took ([\d.]+) s", checker.last_line)
    assert wrote, checker.last_line
    assert checker.grown < MOST_MEMORY
    record_property("lag at the end of the job", f"{took - float(wrote[1]):.1f} s")
    record_property("memory", f"{checker.grown / 1e6:.0f} MB")
