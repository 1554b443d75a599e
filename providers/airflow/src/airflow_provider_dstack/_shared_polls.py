"""Answer the equal polls of many triggers with one request.

Triggers that wait for fleets or offers of one project ask the same question in the same moments: at
multiples of their interval on the clock. The first one that asks waits a moment, the others join it, and all
get its answer. No answer is older than its question: the next one that asks once the request was sent begins
another. If the trigger that asks is cancelled, or its request fails, each of the others asks by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
# How long the first waits for the others. Triggers of one interval wake within some hundredths of a second;
# longer would delay each poll.
_GATHER_SECONDS = 0.1


class SharedPolls:
    """The polls of one process that are about to be sent, by event loop and question."""

    def __init__(self) -> None:
        self._gathering: dict[tuple[asyncio.AbstractEventLoop, Hashable], asyncio.Future[Any]] = {}

    async def ask(self, question: Hashable, request: Callable[[], Awaitable[T]]) -> T:
        """Return the answer to ``question``, which ``request`` fetches, for all callers that ask it now."""
        key = (asyncio.get_running_loop(), question)
        shared = self._gathering.get(key)
        if shared is not None:
            try:
                answer: T = await asyncio.shield(shared)
                return answer
            except asyncio.CancelledError:
                if not shared.cancelled():
                    raise
            except Exception:  # noqa: S110  # its own request has its own error
                pass
            return await request()
        shared = self._gathering[key] = key[0].create_future()
        # Without a reader its error would be logged as forgotten.
        shared.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            try:
                await asyncio.sleep(_GATHER_SECONDS)
            finally:
                del self._gathering[key]
            answer = await request()
        except Exception as error:
            shared.set_exception(error)
            raise
        except BaseException:
            shared.cancel()
            raise
        shared.set_result(answer)
        return answer


@cache
def shared_polls() -> SharedPolls:
    """Return the shared polls of this process, made when the first trigger needs them."""
    return SharedPolls()


def seconds_to_turn(interval: float, now: float) -> float:
    """Return the seconds to the next multiple of ``interval`` on the clock, at least half an interval."""
    left = interval - now % interval
    return left if left >= interval / 2 else left + interval
