"""Delete the project secrets that a task of its own leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_dstack.hooks import DstackHook

# The pause between two passes while a request that sets a secret may still be under way.
_AGAIN_SECONDS = 0.3


def delete_own(
    hook: DstackHook,
    names: Sequence[str],
    *,
    timeout: float,
    log: Any,
    may_appear: Callable[[], bool],
) -> None:
    """Delete the secrets of a task that failed or was ended, which may grow meanwhile. Raises nothing.

    ``may_appear`` is whether the request that sets one may still be under way.
    """
    from dstack_core import UnsupportedServerError

    if not names:
        return
    end = time.monotonic() + timeout
    deleted: list[str] = []
    try:
        with hook.client(retry_budget=timeout) as client:
            while True:
                again = may_appear()
                deleted += [name for name in list(names) if client.secrets.delete(name)]
                if not again or time.monotonic() + _AGAIN_SECONDS > end:
                    break
                time.sleep(_AGAIN_SECONDS)
        if deleted:
            log.warning("Project secrets of this task are deleted: %s.", ", ".join(deleted))
    except UnsupportedServerError:
        # None was set.
        pass
    except Exception as error:
        text = getattr(error, "message", None) or repr(error)
        log.warning("Could not delete project secrets %s: %s. Delete them by hand.", ", ".join(names), text)
