"""A budget for a DAG run that a person may raise: what does not fit waits for Airflow's human in the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

from airflow_provider_dstack._parameters import budget_cost

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context


class DstackBudgetApprovalOperator(ApprovalOperator):
    """An operator that asks for approval when the next run does not fit into the budget of its DAG run.

    While it fits, the task succeeds at once, as a ``DstackBudgetOperator``. Else it waits, without a worker's
    slot, until someone chooses in Airflow's "Required Actions": "Approve" lets the tasks that follow run;
    "Reject" skips them. The request shows what is spent.

    Args:
        max_cost: What all runs of the DAG run may cost together, in USD.
        planned: What the next run may cost, in USD: the ``max_cost`` of the task that follows. Default:
            nothing, so that it fits while anything is left.
        subject: The headline of the request. Default: that a run does not fit into its budget.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``ApprovalOperator``, such as ``assigned_users``, ``notifiers``,
            ``response_timeout`` and ``fail_on_reject``.

    Returns:
        The dict of ``DstackBudgetOperator`` where the run fits, else the response as ``ApprovalOperator``
        returns it.

    Raises:
        AirflowFailException: An amount or the connection is wrong.
        DstackServerUnreachable: The dstack server did not answer.
        HITLTimeoutError: No response came within ``response_timeout``.
        HITLRejectException: The run was rejected, with ``fail_on_reject``.

    Example:
        ``DstackBudgetApprovalOperator(task_id="budget", max_cost=50, planned=20) >> train``

    Source: Airflow documentation, "Human-in-the-Loop Operators".
    """

    template_fields: Sequence[str] = (
        *ApprovalOperator.template_fields,
        "max_cost",
        "planned",
        "dstack_conn_id",
        "project_name",
    )
    ui_color = "#fff4d6"

    def __init__(
        self,
        *,
        max_cost: float | str,
        planned: float | str | None = None,
        subject: str = "A dstack run does not fit into its budget",
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(subject=subject, **kwargs)
        self.max_cost = budget_cost(max_cost)
        self.planned = planned
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name

    def execute(self, context: Context) -> Any:
        """Read what is spent and succeed, or write the request and wait for the response."""
        from airflow_provider_dstack._budget_state import budget_dict, read_state
        from airflow_provider_dstack._outcome import as_airflow_error
        from dstack_core import DstackError as CoreError

        try:
            state = read_state(self, context)
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error
        self.log.info("%s", state.text)
        if state.fits:
            return budget_dict(state)
        self.body = "\n\n".join(filter(None, (state.text, self.body)))
        return super().execute(context)
