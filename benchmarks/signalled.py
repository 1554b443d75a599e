"""A trigger that waits, and writes down the time at which Airflow kills it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class SignalledTrigger(BaseTrigger):
    """A trigger that does nothing for five minutes; ``file`` is where it writes the time of its kill."""

    def __init__(self, file: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.file = file

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return its class and arguments."""
        return "benchmarks.signalled.SignalledTrigger", {"file": self.file}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait."""
        await asyncio.sleep(300)
        yield TriggerEvent({})  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Write down the time."""
        # A write of a few bytes, as soon as possible.
        Path(self.file).write_text(str(time.monotonic()))  # noqa: ASYNC240
