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
# A page holds at most 1,000 messages of 64 KiB, which is what a reader gets that a busy machine left behind: as text,
# base64, parsed, joined and split eight times as much. A minute of the log, kept, would be more than twice that.
MOST_MEMORY = 8 * 1000 * 64 * 1024
SECONDS = pytest.mark.parametrize(
    "seconds", [5, pytest.param(60, marks=[pytest.mark.endurance, pytest.mark.timeout(600)])]
)


@pytest.fixture(scope="module")
def apart() -> Iterator[dict[str, Any]]:
    """Serve from another process, so that this one's memory is the reader's alone."""
    with serving_apart() as arguments:
        yield arguments


class Ear:
    """Check each line as it comes, keep none, and remember how much memory that took at most."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self._before = self._me.memory_info().rss
        self.lines = 0
        self.grown = 0
        self.last_words = ""

    def hear(self, event: dstack.Event) -> None:
        """Take an event."""
        if isinstance(event, dstack.LogLines):
            for line in event.lines:
                if self.last_words or line != (loud_job.LINE % self.lines)[:-1]:
                    assert not self.last_words, f"{line!r} behind the end"
                    self.last_words = line
                else:
                    self.lines += 1
            self.grown = max(self.grown, self._me.memory_info().rss - self._before)


def follow(arguments: dict[str, Any], task: dict[str, Any], ear: Ear) -> None:
    with Client(**arguments) as client:
        for event in client.runs.submit(task).follow(poll_interval=0.2):
            ear.hear(event)


def following(kind: type[dstack.AsyncClient]) -> Callable[[dict[str, Any], dict[str, Any], Ear], None]:
    async def go(arguments: dict[str, Any], task: dict[str, Any], ear: Ear) -> None:
        async with kind(**arguments) as client:
            async for event in (await client.runs.submit(task)).follow(poll_interval=0.2):
                ear.hear(event)

    return lambda arguments, task, ear: asyncio.run(go(arguments, task, ear))


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
    ear = Ear()
    began = time.monotonic()
    WAYS[way](apart, {"type": "task", "commands": [job]}, ear)
    took = time.monotonic() - began
    assert ear.lines == seconds * PACE // 100
    wrote = re.fullmatch(r"took ([\d.]+) s", ear.last_words)
    assert wrote, ear.last_words
    assert ear.grown < MOST_MEMORY
    record_property("behind the job at its end", f"{took - float(wrote[1]):.1f} s")
    record_property("memory", f"{ear.grown / 1e6:.0f} MB")
