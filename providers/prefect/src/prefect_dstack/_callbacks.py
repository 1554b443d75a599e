"""Callbacks of a run in Prefect: made and checked before anything is submitted, called by ``dstack_core``.

They are called in a thread that has the context of the task, so ``get_run_logger`` works in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext, TaskRunContext

if TYPE_CHECKING:
    from dstack_core import CallbacksLike
    from dstack_core.integration import CallbackNotifier
    from prefect_dstack._log_relay import Relay


def new_notifier(callbacks: CallbacksLike, relay: Relay, logger: Any) -> CallbackNotifier:
    """Return what calls the callbacks of one run. Raises ``ConfigurationError`` when one cannot be made."""
    from dstack_core import load_callbacks
    from dstack_core.integration import CallbackNotifier

    return CallbackNotifier(load_callbacks(callbacks), log=logger, mask=relay.masker.mask, source=_source())


def _source() -> dict[str, str]:
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    found: dict[str, object] = {}
    if task is not None:
        found = {"flow_run_id": task.task_run.flow_run_id, "task_run_id": task.task_run.id}
    elif flow is not None and flow.flow_run is not None:
        found = {"flow_run_id": flow.flow_run.id}
    return {name: str(value) for name, value in found.items() if value is not None}
