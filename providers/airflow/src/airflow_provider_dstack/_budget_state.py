"""Read how much of an operator's budget its DAG run has spent."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from dstack_core.integration import BudgetState

# The clocks of Airflow and of the dstack server may differ by this much.
_CLOCKS = timedelta(hours=1)


def read_state(operator: Any, context: Context) -> BudgetState:
    """Return how much of an operator's budget is spent. Raises the errors of ``dstack_core``."""
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core.integration import make_marker, read_budget

    ti, started = context["ti"], getattr(context.get("dag_run"), "start_date", None)
    with DstackHook(operator.dstack_conn_id, operator.project_name).client() as client:
        return read_budget(
            client,
            operator.max_cost,
            planned=operator.planned,
            # As ``TaskNames`` makes it for the tasks of a DAG run.
            marker_prefix=make_marker("airflow", ti.dag_id, ti.run_id, ""),
            since=None if started is None else started - _CLOCKS,
        )


def budget_dict(state: BudgetState) -> dict[str, float]:
    """Return the amounts as values that JSON has."""
    names = ("max_cost", "spent", "reserved", "planned", "left")
    return {name: float(getattr(state, name)) for name in names}
