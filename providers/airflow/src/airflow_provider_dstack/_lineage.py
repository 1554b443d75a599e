"""OpenLineage: which task a run belongs to, for tools inside the run, and what the run did.

Everything is left out where Airflow's OpenLineage provider is not installed, or is switched off; nothing of
it is imported then. Source: OpenLineage documentation, "Parent Run Facet" and "dbt" (the variables
``OPENLINEAGE_PARENT_ID`` and ``OPENLINEAGE_ROOT_PARENT_ID``); documentation of Airflow's OpenLineage
provider, "Job Hierarchy & Macros" and "Implementing OpenLineage in Operators".
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from dstack_core import Outcome

_PROVIDER = "airflow.providers.openlineage"


def lineage_env(ti: Any, log: Any) -> dict[str, str]:
    """Return the variables that make the task the parent of what the run reports to OpenLineage."""
    if not _is_on():
        return {}
    try:
        macros: Any = import_module(f"{_PROVIDER}.plugins.macros")
        namespace, job = macros.lineage_job_namespace(), macros.lineage_job_name(ti)
        env = {"OPENLINEAGE_NAMESPACE": namespace, "OPENLINEAGE_PARENT_ID": macros.lineage_parent_id(ti)}
        if (root := getattr(macros, "lineage_root_parent_id", None)) is not None:
            env["OPENLINEAGE_ROOT_PARENT_ID"] = root(ti)
    except Exception as error:
        log.warning("Could not pass the task to the run's OpenLineage: %r.", error)
        return {}
    log.debug("OpenLineage in the run has the parent %s/%s.", namespace, job)
    return {name: str(value) for name, value in env.items()}


def facets(outcome: Outcome | None, assets: Sequence[Mapping[str, Any]]) -> Any:
    """Return the lineage of a task's run, empty while it is not known; None where OpenLineage is off.

    ``assets`` are those that the run reported, each with ``uri``.
    """
    if not _is_on():
        return None
    base: Any = import_module(f"{_PROVIDER}.extractors.base")
    if outcome is None:
        # The provider warns of None.
        return base.OperatorLineage()
    events: Any = import_module("openlineage.client.event_v2")
    external_query_run: Any = import_module("openlineage.client.facet_v2").external_query_run
    return base.OperatorLineage(
        outputs=[events.Dataset(*_dataset_of(str(asset["uri"]))) for asset in assets],
        run_facets={
            "externalQuery": external_query_run.ExternalQueryRunFacet(
                externalQueryId=outcome.run_id, source=outcome.url
            ),
            "dstack": _run_facet()(
                run_name=outcome.run_name,
                project=outcome.project,
                status=str(outcome.status),
                category=outcome.category or None,
                cost_usd=outcome.cost,
                duration_seconds=outcome.duration,
                backend=outcome.backend,
                region=outcome.region,
                instance=outcome.instance,
                price_per_hour_usd=outcome.price_per_hour,
            ),
        },
    )


def _is_on() -> bool:
    """Whether the provider is there and on; asks ``conf`` of the provider only if it is installed."""
    if _PROVIDER not in sys.modules and find_spec(_PROVIDER) is None:
        return False
    try:
        return not import_module(f"{_PROVIDER}.conf").is_disabled()
    except Exception:
        # A provider of which not even the settings can be read reports nothing either.
        return False


@cache
def _run_facet() -> Any:
    """Return the class of the facet ``dstack``, whose base is there only where OpenLineage is."""
    import attr

    base = import_module("openlineage.client.facet_v2").RunFacet
    fields = (
        *("run_name", "project", "status", "category", "cost_usd", "duration_seconds"),
        *("backend", "region", "instance", "price_per_hour_usd"),
    )
    made = {name: attr.field(default=None, kw_only=True) for name in fields}
    return attr.make_class("DstackRunFacet", made, bases=(base,))


def _dataset_of(uri: str) -> tuple[str, str]:
    """Return namespace and name of a dataset, as OpenLineage's naming has them for storage and tables."""
    parts = urlsplit(uri)
    scheme = parts.scheme or "file"
    if parts.netloc:
        return f"{scheme}://{parts.netloc}", parts.path.lstrip("/")
    return scheme, parts.path
