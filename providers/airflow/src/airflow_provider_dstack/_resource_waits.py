"""The waits of tasks that create and delete fleets and volumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted

# How late a kill ends a wait.
_TICK_SECONDS = 0.2
# How long to wait before what runs still use is deleted again.
_IN_USE_SECONDS = 5.0


def sleep_unless(is_killed: Callable[[], bool], seconds: float, what: str) -> None:
    """Sleep; raise ``DstackRunInterrupted`` soon after a kill."""
    from dstack_core import clock

    if clock.is_virtual():
        clock.sleep(seconds)
    end = time.monotonic() + (0.0 if clock.is_virtual() else seconds)
    while not is_killed() and (left := end - time.monotonic()) > 0:
        time.sleep(min(_TICK_SECONDS, left))
    if is_killed():
        raise DstackRunInterrupted(f"The task was ended before {what}.")


def delete_until_gone(
    delete: Callable[[float], bool],
    *,
    timeout: float,
    sleep: Callable[[float], None],
    log: Any,
    deleted: str,
    gone: str,
    expected: str,
) -> str:
    """Delete a resource and wait for its end; return ``"deleted"``, or ``"gone"`` without one.

    Runs of tasks that are ending may still use it, so a refusal is tried again until ``timeout`` seconds have
    passed. ``delete`` gets the seconds that are left, and returns whether the resource was there. ``deleted``
    and ``gone`` are logged; ``expected`` begins the error of one that is still there. Raises ``DstackError``
    and the server errors of ``dstack_core``.
    """
    from dstack_core import RequestRejectedError, WaitTimeoutError, clock

    end = clock.monotonic() + timeout
    while True:
        try:
            if delete(max(end - clock.monotonic(), 1.0)):
                log.info("%s", deleted)
                return "deleted"
            log.info("%s", gone)
            return "gone"
        except WaitTimeoutError as error:
            raise DstackError(
                f"{expected} to be gone within {timeout:g} s, got {error.message}. "
                "Check it in the cloud, or raise wait_timeout."
            ) from None
        except RequestRejectedError as error:
            if clock.monotonic() + _IN_USE_SECONDS > end:
                raise
            log.warning("%s Deleting it again in %g s.", error.message, _IN_USE_SECONDS)
            sleep(_IN_USE_SECONDS)
