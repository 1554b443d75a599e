"""A budget for a DAG run: a task before the one that spends checks that it still fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from airflow_provider_dstack._compat import AirflowFailException, AirflowSkipException, BaseOperator
from airflow_provider_dstack._parameters import budget_cost, one_of

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context

WhenSpent: TypeAlias = Literal["fail", "skip"]
_WHEN_SPENT = ("fail", "skip")


class DstackBudgetOperator(BaseOperator):
    """An operator that succeeds while the next run fits into the budget of its DAG run.

    It adds up what the DAG run's dstack runs have cost, of all tasks and tries, and what active ones with a
    ``max_cost`` may still cost, from the dstack server.

    Args:
        max_cost: What all runs of the DAG run may cost together, in USD.
        planned: What the next run may cost, in USD: the ``max_cost`` of the task that follows. Default:
            nothing, so that it fits while anything is left.
        when_spent: ``"fail"``, without a retry, or ``"skip"``: the task and, by their trigger rules, those
            that follow are skipped. Default ``"fail"``.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A dict of floats in USD: ``max_cost``, ``spent``, ``reserved``, ``planned`` and ``left``.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        AirflowFailException: The next run does not fit, or an amount or the connection is wrong.
        AirflowSkipException: The next run does not fit, and ``when_spent`` is ``"skip"``.
        DstackServerUnreachable: The dstack server did not answer.

    Example:
        ``DstackBudgetOperator(task_id="budget", max_cost=50, planned=20) >> train``
    """

    template_fields: Sequence[str] = ("max_cost", "planned", "dstack_conn_id", "project_name")
    ui_color = "#fff4d6"

    def __init__(
        self,
        *,
        max_cost: float | str,
        planned: float | str | None = None,
        when_spent: WhenSpent = "fail",
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_cost = budget_cost(max_cost)
        self.planned = planned
        self.when_spent = one_of("when_spent", when_spent, _WHEN_SPENT)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name

    def execute(self, context: Context) -> dict[str, float]:
        """Read what is spent, log it, and succeed, fail or skip."""
        from airflow_provider_dstack._budget_state import budget_dict, read_state
        from airflow_provider_dstack._outcome import as_airflow_error
        from dstack_core import DstackError as CoreError
        from dstack_core.integration import BudgetSpentError

        try:
            state = read_state(self, context)
            self.log.info("%s", state.text)
            state.raise_for_status()
        except BudgetSpentError as error:
            if self.when_spent == "skip":
                raise AirflowSkipException(error.message) from None
            raise AirflowFailException(error.message) from None
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error
        return budget_dict(state)


class DstackBudget:
    """A budget that several tasks of a DAG share: each run of the DAG may spend it once.

    ``covers`` puts a ``DstackBudgetOperator`` before each of the tasks, whose ``max_cost`` is what it plans;
    with ``when_spent="approve"``, a ``DstackBudgetApprovalOperator``.

    Args:
        max_cost: What all runs of one DAG run may cost together, in USD.
        when_spent: What happens to a task that does not fit: ``"fail"``, ``"skip"``, or ``"approve"``: it
            waits for a person's approval in Airflow's "Required Actions". Default ``"fail"``.
        approval: With ``"approve"``, arguments of Airflow's ``ApprovalOperator``, such as ``assigned_users``
            and ``response_timeout``. Default: none.

    Raises:
        ValueError: ``max_cost``, ``when_spent`` or ``approval`` is wrong.

    Example:
        ``DstackBudget(max_cost=50, when_spent="skip").covers(train, evaluate)``
    """

    def __init__(
        self,
        max_cost: float | str,
        when_spent: WhenSpent | Literal["approve"] = "fail",
        *,
        approval: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_cost = budget_cost(max_cost)
        self.when_spent = one_of("when_spent", when_spent, (*_WHEN_SPENT, "approve"))
        self.approval = dict(approval or {})
        if self.approval and when_spent != "approve":
            raise ValueError(f'approval: expected when_spent="approve" with it, got {when_spent!r}.')

    def covers(self, *tasks: Any) -> list[BaseOperator]:
        """Put a check before each task, in the current DAG, and return the checks.

        The check of ``train`` is the task ``train_budget``. It runs when ``train`` would: after what is
        upstream of it at the time of this call.

        Args:
            tasks: Operators, or what ``@task.dstack`` functions return. A task without ``max_cost`` fits
                while anything is left.
        """
        checks = []
        for task in tasks:
            operator = getattr(task, "operator", task)
            check = self._check(
                task_id=f"{operator.task_id}_budget",
                max_cost=self.max_cost,
                planned=getattr(operator, "max_cost", None),
                dstack_conn_id=getattr(operator, "dstack_conn_id", "dstack_default"),
                project_name=getattr(operator, "project_name", None),
            )
            for before in operator.upstream_list:
                before.set_downstream(check)
            check.set_downstream(operator)
            checks.append(check)
        return checks

    def _check(self, **arguments: Any) -> BaseOperator:
        if self.when_spent != "approve":
            return DstackBudgetOperator(when_spent=self.when_spent, **arguments)
        # Only here: a DAG file without approvals does not import Airflow's operators for them.
        from airflow_provider_dstack.budget_approval import DstackBudgetApprovalOperator

        return DstackBudgetApprovalOperator(**{**self.approval, **arguments})
