"""Waits of the tasks that follow no run: for machines, volumes and offers. A cancellation ends them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from prefect_dstack._cancellation import SLICE_SECONDS, CancelProbe, StopRequested, current_task_runner
from prefect_dstack._names import Owner


def run_logger() -> Any:
    """Return the logger of the current task or flow, else the package's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("prefect_dstack")


class Waits:
    """The pauses of one task or flow; each raises ``StopRequested`` once its flow run was cancelled."""

    def __init__(self, owner: Owner) -> None:
        self._probe = CancelProbe(owner.flow_run_id, current_task_runner())

    def check(self) -> None:
        """Raise ``StopRequested`` if nothing may be created any more; asks the Prefect server once."""
        if (request := self._probe.ask_before_submit()) is not None:
            raise request

    def sleep(self, seconds: float) -> None:
        """Wait in short slices."""
        from dstack_core import clock

        def after_slice() -> None:
            if self._probe.is_due and (request := self._probe.ask()) is not None:
                raise request

        clock.sleep_in_slices(seconds, SLICE_SECONDS, after_slice)

    async def asleep(self, seconds: float) -> None:
        """Wait in short slices: the twin of ``sleep``."""
        from dstack_core import clock

        async def after_slice() -> None:
            if self._probe.is_due and (request := await asyncio.to_thread(self._probe.ask)) is not None:
                raise request

        await clock.asleep_in_slices(seconds, SLICE_SECONDS, after_slice)

    def close(self) -> None:
        """Close the connection to the Prefect server."""
        self._probe.close()


def cancelled(request: StopRequested, done: str) -> Any:
    """Return the state of a task that was cancelled without a signal; ``done`` is a sentence on what it did.

    A state is returned because an exception would make Prefect start the task's next retry.
    """
    from prefect.states import Cancelled

    reason = f"{request.reason[:1].upper()}{request.reason[1:]}"
    return Cancelled(message=f"{reason}. {done}")
