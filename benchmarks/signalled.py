"""A trigger that waits and writes down when Airflow says that it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class SignalledTrigger(BaseTrigger):
    """Do nothing for five minutes; ``file`` is where the moment is written to."""

    def __init__(self, file: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.file = file

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return how to make it again."""
        return "benchmarks.signalled.SignalledTrigger", {"file": self.file}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait."""
        await asyncio.sleep(300)
        yield TriggerEvent({})  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Tell the moment."""
        # A write of a few bytes, as soon as can be.
        Path(self.file).write_text(str(time.monotonic()))  # noqa: ASYNC240
