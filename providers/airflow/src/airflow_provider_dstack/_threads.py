"""Start threads whose log reaches the task's log."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")

_TICK_SECONDS = 0.02


def start_thread(target: Callable[[], None], name: str) -> None:
    """Run ``target`` in a thread that does not keep the process alive."""
    # The copied context carries what Airflow's logging binds to the task.
    threading.Thread(target=contextvars.copy_context().run, args=(target,), name=name, daemon=True).start()


def answer_within(seconds: float, question: Callable[[], T]) -> T | None:
    """Return what ``question`` returns; None when it raises, or has no answer within ``seconds``."""
    answers: list[T | None] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception:
            answers.append(None)

    start_thread(ask, "dstack-question")
    deadline = time.monotonic() + seconds
    while not answers and time.monotonic() < deadline:
        time.sleep(_TICK_SECONDS)
    return answers[0] if answers else None


@cache
def threads(purpose: str, number: int) -> ThreadPoolExecutor:
    """Return the threads that all triggers of this process share, made when the first one needs them."""
    return ThreadPoolExecutor(max_workers=number, thread_name_prefix=f"dstack-{purpose}")


def in_thread(function: Callable[[], T], purpose: str = "trigger") -> asyncio.Future[T]:
    """Run ``function`` in a thread of this package's own; its log reaches the task's."""
    context = contextvars.copy_context()
    return asyncio.get_running_loop().run_in_executor(threads(purpose, 4), lambda: context.run(function))
