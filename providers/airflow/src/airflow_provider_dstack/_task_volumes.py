"""Which volume is whose, and how volumes are deleted.

A server keeps no mark of an owner on a volume, so the owner is in the volume's tags, from which the cloud's
labels are made. Clouds allow few characters in those, hence hashes: one of the DAG's id, and one of the task
in its DAG run, with the map index behind it. A volume that is kept for all DAG runs has ``kept`` instead of
the latter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._resource_waits import delete_until_gone

if TYPE_CHECKING:
    from airflow_provider_dstack._resource_names import ResourceOwner
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client, Volume

_DAG_TAG, _TASK_TAG = "dstack-airflow-dag", "dstack-airflow-task"
_KEPT = "kept"
# The pause between two requests for a volume whose creation is still under way while its task is killed.
_AGAIN_SECONDS = 0.3


def tags_of(owner: ResourceOwner, *, keep: bool) -> dict[str, str]:
    """Return the tags by which every try of a task, or with ``keep`` every DAG run, recognizes its volume."""
    index = "" if owner.map_index is None else f"-{owner.map_index}"
    return {_DAG_TAG: _dag(owner.dag_id), _TASK_TAG: _KEPT if keep else f"{_task(owner)}{index}"}


def is_of_dag(volume: Volume, dag_id: str) -> bool:
    """Return whether a task of that DAG has created the volume."""
    return volume.tags.get(_DAG_TAG) == _dag(dag_id)


def is_of_task(volume: Volume, owner: ResourceOwner) -> bool:
    """Return whether a volume is that of a task; of any mapped instance of it if the owner has no index."""
    task, _, index = volume.tags.get(_TASK_TAG, "").partition("-")
    return task == _task(owner) and (owner.map_index is None or index == str(owner.map_index))


def _dag(dag_id: str) -> str:
    from dstack_core.integration import short_hash

    return short_hash(dag_id)


def _task(owner: ResourceOwner) -> str:
    from dstack_core.integration import short_hash

    return short_hash(replace(owner, map_index=None).mark)


def delete_unused(
    hook: DstackHook,
    name: str,
    tags: Mapping[str, str],
    *,
    timeout: float,
    log: Any,
    may_appear: Callable[[], bool] = lambda: False,
) -> bool:
    """Delete the volume of a task that failed or was ended, unless it became active; return whether it did.

    Raises nothing.

    ``tags`` are those of ``tags_of``. An active volume may hold data, so it is left, and so is one that other
    DAG runs may wait for. ``may_appear`` is whether the request that creates it may still be under way.
    """
    end = time.monotonic() + timeout
    try:
        with hook.client(retry_budget=timeout) as client:
            while True:
                volume = client.volumes.get(name)
                if volume is not None and _is_unused(volume, tags):
                    client.volumes.delete(name, timeout=max(end - time.monotonic(), 0.1))
                    log.warning("Volume %s of this task is deleted; its status was %s.", name, volume.status)
                    return True
                if volume is not None or not may_appear() or end - time.monotonic() <= _AGAIN_SECONDS:
                    return False
                time.sleep(_AGAIN_SECONDS)
    except Exception as error:
        log.warning("Could not delete volume %s: %s. Delete it by hand if it is there.", name, error)
        return False


def _is_unused(volume: Volume, tags: Mapping[str, str]) -> bool:
    if any(volume.tags.get(key) != value for key, value in tags.items()):
        return False
    return volume.has_failed or not (volume.is_active or tags[_TASK_TAG] == _KEPT)


def delete_volume(
    client: Client, name: str, *, timeout: float, sleep: Callable[[float], None], log: Any
) -> str:
    """Delete a volume and wait for its end; return ``"deleted"``, or ``"gone"`` without one.

    Runs of tasks that are ending may still use it, so a refusal is tried again until ``timeout`` seconds have
    passed. Raises ``DstackError`` and the server errors of ``dstack_core``.
    """
    return delete_until_gone(
        lambda left: client.volumes.delete(name, until="deleted", timeout=left, sleep=sleep),
        timeout=timeout,
        sleep=sleep,
        log=log,
        deleted=f"Volume {name} and its data are deleted.",
        gone=f"There is no volume {name} in project {client.project}.",
        expected=f"Volume {name}: expected it",
    )
