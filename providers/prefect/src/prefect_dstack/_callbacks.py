"""Callbacks of a run in Prefect: made and checked before anything is submitted, called by ``dstack_core``.

They are called in a thread that has the context of the task, so ``get_run_logger`` works in them. The worker
of a work pool gets paths, as job variables are JSON, and imports the classes in its own process. A process
that calls a flow of ``@dstack`` is such a worker, too, and has what it was given as objects besides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext, TaskRunContext

if TYPE_CHECKING:
    from dstack_core import CallbacksLike, Run, RunError
    from dstack_core.aio_run import AsyncRun
    from dstack_core.integration import CallbackNotifier
    from prefect_dstack._log_relay import Relay


def new_notifier(callbacks: CallbacksLike, relay: Relay, logger: Any) -> CallbackNotifier:
    """Return what calls the callbacks of one run. Raises ``ConfigurationError`` when one cannot be made."""
    from dstack_core import load_callbacks

    return _notifier(load_callbacks(callbacks), relay, logger, _source())


def notifier_of_worker(
    callbacks: Sequence[Any], relay: Relay, logger: Any, flow_run_id: Any
) -> CallbackNotifier:
    """Return what calls the callbacks (instances) of a flow run's machine."""
    return _notifier(callbacks, relay, logger, {"flow_run_id": str(flow_run_id)})


def _notifier(
    callbacks: Sequence[Any], relay: Relay, logger: Any, source: dict[str, str]
) -> CallbackNotifier:
    from dstack_core.integration import CallbackNotifier

    return CallbackNotifier(callbacks, log=logger, mask=relay.masker.mask, source=source)


async def load_in_worker(callbacks: Sequence[Any]) -> list[Any]:
    """Return instances of a machine's callbacks. Raises ``ConfigurationError`` when one cannot be made."""
    from dstack_core import load_callbacks

    # An import may take seconds, in which a worker would follow no machine.
    return await asyncio.to_thread(load_callbacks, list(callbacks)) if callbacks else []


async def load_what_can_be(callbacks: Sequence[Any], logger: Any) -> list[Any]:
    """Return instances of the callbacks for a machine that runs: one warning if one cannot be made."""
    try:
        return await load_in_worker(callbacks)
    except Exception as error:
        logger.warning("%s The callbacks of this flow run are not called by this worker.", error)
        return []


def paths_and_own(callbacks: CallbacksLike) -> tuple[list[str], list[Any]]:
    """Return the paths of the callbacks that any process can import, and those that only this one has.

    Raises ``ConfigurationError`` for what cannot be called.
    """
    from dstack_core import ConfigurationError, check_callbacks

    paths, own = [], []
    for one in check_callbacks(callbacks):
        try:
            paths += [str(path) for path in check_callbacks(one, by_path=True)]
        except ConfigurationError:
            own.append(one)
    return paths, own


def check_paths(value: list[str] | None) -> list[str] | None:
    """Return the paths of a block or a work pool. Raises ``ValueError`` for what is not a path."""
    from dstack_core import ConfigurationError, check_callbacks

    try:
        # Prefect fills in a template later.
        check_callbacks([path for path in value or () if "{{" not in path])
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return value


def note_wait(
    notifier: CallbackNotifier | None, run: Run | AsyncRun, failed: RunError | None, *, answers: bool
) -> None:
    """Call ``on_running`` for a service that answers, ``on_ended`` for one that ended before."""
    from dstack_core import Progress, RunStatus, StatusChanged

    if notifier is None:
        return
    if failed is not None:
        notifier.ended(failed.outcome)
    elif answers:
        notifier.handle(StatusChanged(Progress(run.name), RunStatus.RUNNING, None, None))


def _source() -> dict[str, str]:
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    found: dict[str, object] = {}
    if task is not None:
        found = {"flow_run_id": task.task_run.flow_run_id, "task_run_id": task.task_run.id}
    elif flow is not None and flow.flow_run is not None:
        found = {"flow_run_id": flow.flow_run.id}
    return {name: str(value) for name, value in found.items() if value is not None}
