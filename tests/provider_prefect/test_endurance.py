"""Many tasks in one process leave no file descriptor, thread, process or temporary file."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from prefect import flow

from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from tests.faults.leftovers import Held, assert_nothing_is_left

from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")
COUNTS = pytest.mark.parametrize(
    "count", [10, pytest.param(100, marks=[pytest.mark.endurance, pytest.mark.timeout(1200)])]
)
TASK = {"type": "task", "commands": ["seq 1 20"]}


def sync(block: DstackCredentials, count: int) -> None:
    """Run so many tasks, one after the other."""

    @flow
    def many() -> list[str]:
        return [run_task(TASK, block, **FAST)["status"] for _ in range(count)]

    assert many() == ["done"] * count


def asynchronous(block: DstackCredentials, count: int) -> None:
    """Run so many tasks, five at a time."""

    @flow
    async def many() -> list[str]:
        told = []
        for _ in range(0, count, 5):
            told += await asyncio.gather(*(arun_task(TASK, block, **FAST) for _ in range(5)))
        return [outcome["status"] for outcome in told]

    assert asyncio.run(many()) == ["done"] * count


@COUNTS
@pytest.mark.parametrize("way", [sync, asynchronous])
def test_many_tasks_leave_nothing(
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: object,
    count: int,
) -> None:
    assert callable(way)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    way(credentials, 5)
    before = Held.now()
    way(credentials, count)
    assert_nothing_is_left(before)
