"""The tags by which the bill of a cloud shows what a flow's runs have cost.

A tag's key is the same on every cloud, and its value is valid on the strictest (``tag_value``). The prefix
keeps them apart from the tags of the cloud's own accounts, and from dstack's. Labels that the user gave a
flow run or a work pool become tags with their own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from uuid import UUID

from prefect.context import FlowRunContext, TaskRunContext

from prefect_dstack._cancellation import quick_prefect_client
from prefect_dstack._names import name_of_task

# Prefect's own labels of a flow run, and of a worker's infrastructure.
_OF_PREFECT = ("prefect.", "prefect.io/")
_OF_WORKER = {
    "prefect-flow": "prefect.io/flow-name",
    "prefect-deployment": "prefect.io/deployment-name",
    "prefect-flow-run": "prefect.io/flow-run-name",
    "prefect-flow-run-id": "prefect.io/flow-run-id",
    "prefect-work-pool": "prefect.io/work-pool-name",
}


def tags_of_task() -> dict[str, str]:
    """Return the tags of a run that the current task or flow submits; may ask the Prefect server once.

    Tags that cannot be found out are left out: no run fails over them.
    """
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    flow_run = None if flow is None else flow.flow_run
    facts = {
        "prefect-flow": None if flow is None or flow.flow is None else flow.flow.name,
        "prefect-deployment": None if flow_run is None else _deployment(flow_run.deployment_id),
        "prefect-flow-run": None if flow_run is None else flow_run.name,
        "prefect-flow-run-id": None if flow_run is None else flow_run.id,
        "prefect-task": None if task is None else name_of_task(task.task) or task.task.name,
        "prefect-work-pool": None if flow_run is None else flow_run.work_pool_name,
    }
    if flow_run is None and task is not None and task.task_run.flow_run_id is not None:
        facts["prefect-flow-run-id"] = task.task_run.flow_run_id
    return _as_tags({**_own_labels({} if flow_run is None else flow_run.labels), **facts})


def tags_of_worker(labels: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of the machine of a work pool's flow run; ``labels`` are Prefect's of the machine."""
    facts = {tag: labels.get(label) for tag, label in _OF_WORKER.items()}
    return _as_tags({**_own_labels(labels), **facts})


def default_tags(given: dict[str, str] | bool | None, automatic: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that a client's runs have by default: ``given`` by a block, which win."""
    if given is False:
        return {}
    return {**automatic, **(given if isinstance(given, dict) else {})}


def _own_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if not name.startswith(_OF_PREFECT)}


def _as_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    from dstack_core.integration import tag_value

    # The key's last word, such as "flow", stands for a name of which no ASCII is left.
    values = {
        tag_value(key, default="label")[:60]: ""
        if fact is None
        else tag_value(fact, default=tag_value(key.rpartition("-")[2], default="label"))
        for key, fact in facts.items()
    }
    return {key: value for key, value in values.items() if key and value}


def _deployment(deployment_id: UUID | None) -> str | None:
    try:
        return None if deployment_id is None else _deployment_name(deployment_id)
    except Exception:
        return str(deployment_id)


@lru_cache(maxsize=100)
def _deployment_name(deployment_id: UUID) -> str:
    with quick_prefect_client() as api:
        return api.read_deployment(deployment_id).name


def one_kind_of_tags(value: Any) -> Any:
    """Return what a block's field of tags may hold; raise one ``ValueError`` for anything else.

    Without it, pydantic reports one error for each type that the field may have.
    """
    if value is None or isinstance(value, bool | Mapping):
        return value
    raise ValueError(f'expected a dict such as {{"team": "ml"}}, or False for no tags, got {value!r}.')
