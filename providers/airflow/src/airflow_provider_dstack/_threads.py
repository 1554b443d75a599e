"""Start threads whose log reaches the task's log."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")

# The loop itself holds its tasks weakly.
_CALLS: set[asyncio.Future[None]] = set()


def start_thread(target: Callable[[], None], name: str) -> None:
    """Run ``target`` in a thread that does not keep the process alive."""
    # The copied context carries what Airflow's logging binds to the task.
    threading.Thread(target=contextvars.copy_context().run, args=(target,), name=name, daemon=True).start()


@cache
def threads(purpose: str, number: int) -> ThreadPoolExecutor:
    """Return the threads that all triggers of this process share, made when the first one needs them."""
    return ThreadPoolExecutor(max_workers=number, thread_name_prefix=f"dstack-{purpose}")


def in_thread(function: Callable[[], T], purpose: str = "trigger", number: int = 4) -> asyncio.Future[T]:
    """Run ``function`` in one of ``number`` threads of this package's own; its log reaches the task's.

    It may ask Airflow something. What has begun continues when the future is cancelled: before Airflow 3.3 a
    triggerer that reads half an answer dies of the other half.
    """
    from asgiref.sync import sync_to_async

    result: Future[T] = Future()

    def work() -> None:
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

    def ended(call: asyncio.Future[None]) -> None:
        _CALLS.discard(call)
        result.cancel()

    # Before Airflow 3.3 a thread reaches Airflow through the loop that asgiref knows it by.
    call = asyncio.ensure_future(
        sync_to_async(work, thread_sensitive=False, executor=threads(purpose, number))()
    )
    _CALLS.add(call)
    call.add_done_callback(ended)
    return asyncio.wrap_future(result)
