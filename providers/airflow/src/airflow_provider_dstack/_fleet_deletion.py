"""Delete fleets: the one that a task of its own leaves behind, and those of a DAG run at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._resource_waits import delete_until_gone

if TYPE_CHECKING:
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client

# The pause between two requests for a fleet whose creation is still under way while its task is killed.
_AGAIN_SECONDS = 0.3
_REAPER = "A DstackReapOperator, where one is scheduled, deletes it at its next pass."


def delete_own(
    hook: DstackHook,
    name: str,
    mark: str,
    *,
    timeout: float,
    log: Any,
    may_appear: Callable[[], bool] = lambda: False,
) -> bool:
    """Delete the fleet of a task that failed or was ended; return whether nothing is left. Raises nothing.

    ``may_appear`` is whether the request that creates it may still be under way.
    """
    from dstack_core import DstackError as CoreError
    from dstack_core import ResourceNameTakenError

    end = time.monotonic() + timeout
    try:
        with hook.client(retry_budget=timeout) as client:
            while True:
                left = max(end - time.monotonic(), 0.1)
                found = client.fleets.get(name)
                # A kill and the end of its task both come here; the second is not to log it again.
                is_ending = found is not None and found.marker == mark and found.is_terminating
                if not is_ending and client.fleets.delete(name, marker=mark, timeout=left):
                    log.warning("Fleet %s of this task is deleted.", name)
                    return True
                if not may_appear() or left <= _AGAIN_SECONDS:
                    return True
                time.sleep(_AGAIN_SECONDS)
    except ResourceNameTakenError:
        # It was never this task's.
        return True
    except CoreError as error:
        log.warning("Could not delete fleet %s: %s. Delete it by hand. %s", name, error.message, _REAPER)
    except Exception as error:
        log.warning("Could not delete fleet %s: %r. Delete it by hand. %s", name, error, _REAPER)
    return False


def delete_fleet(
    client: Client,
    name: str,
    mark: str | None,
    *,
    timeout: float,
    sleep: Callable[[float], None],
    log: Any,
) -> str:
    """Delete a fleet with that mark and wait for its end; return ``"deleted"``, or ``"gone"`` without one.

    Runs of tasks that are ending may still use it, so a refusal is tried again until ``timeout`` seconds have
    passed. Raises ``DstackError`` and the server errors of ``dstack_core``.
    """
    return delete_until_gone(
        lambda left: client.fleets.delete(name, marker=mark, until="deleted", timeout=left, sleep=sleep),
        timeout=timeout,
        sleep=sleep,
        log=log,
        deleted=f"Fleet {name} and its machines are deleted.",
        gone=f"There is no fleet {name} in project {client.project}.",
        expected=f"Fleet {name}: expected its machines",
    )
