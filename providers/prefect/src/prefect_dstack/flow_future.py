"""The future of a flow run on a machine."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

from prefect import State
from prefect.futures import PrefectFlowRunFuture

from prefect_dstack import _flow_result
from prefect_dstack._flow_runs import in_thread

R = TypeVar("R")


class DstackFlowRunFuture(PrefectFlowRunFuture[R], Generic[R]):
    """The flow run of a flow on a machine; ``result`` waits for it."""

    def __init__(self, flow_run_id: UUID, *, carries_result: bool = True) -> None:
        super().__init__(flow_run_id)
        self._carries_result = carries_result

    @property
    def state(self) -> State[R]:
        """The state of the flow run; a final one holds the result."""
        state: State[R] = super().state
        return in_thread(self._with_value(state)).result() if state.is_final() else state

    async def final_state(self) -> State[R]:
        """Wait for the final state and return it with the result."""
        await self.wait_async()
        return await self._with_value(super().state)

    async def aresult(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Return what the flow returned, or raise what it raised.

        Raises:
            TimeoutError: The flow run has not ended within ``timeout`` seconds.
            CrashedRun: Its machine failed.
            CancelledRun: It was cancelled.
        """
        await self.wait_async(timeout=timeout)
        state: State[R] = super().state
        if not state.is_final():
            raise TimeoutError(f"flow run {self.flow_run_id}: expected its end within {timeout} s.")
        result: Any = await (await self._with_value(state)).aresult(raise_on_failure=raise_on_failure)
        return cast(R, result)

    async def _with_value(self, state: State[R]) -> State[R]:
        if not self._carries_result or not (state.is_completed() or state.is_failed()):
            return state
        try:
            value = await _flow_result.read_result(self.flow_run_id)
        except Exception:
            # An exception that cannot be pickled must not hide that the flow failed; the state has its text.
            if state.is_failed():
                return state.model_copy(update={"data": None})
            raise
        if value is None:
            from prefect.results import ResultStore

            # Prefect takes None for a missing result, unless it is in a record. It may make a request for it.
            value = await asyncio.to_thread(ResultStore().create_result_record, None)
        return state.model_copy(update={"data": value})
