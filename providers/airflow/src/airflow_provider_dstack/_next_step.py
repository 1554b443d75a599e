"""The step that follows one that has ended while its task was deferred.

The problem: a trigger follows one run, and submits nothing: a submission needs the code, the secrets and the
record of a worker. The task must not lose what the earlier steps have shown, cost and used of its time.

The idea: the trigger carries what is known of the steps as JSON, and its event holds it. The resumed task
decides by the outcome in the event, submits the step that follows as ``execute`` does, and defers again.

Invariant: what follows a step depends on its outcome alone, so a task whose worker is lost here finds the
same step in its next try.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._from_operator import Resumed, fallbacks_of, task_run_of

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._resumed_log import FinishedLog
    from airflow_provider_dstack._run_reports import RunReports
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.operators import DstackRunOperator
    from dstack_core import Outcome


def after_step(
    operator: DstackRunOperator,
    context: Context,
    event: Mapping[str, Any],
    finished: FinishedLog,
    reports: RunReports,
    hand_over_after: float | None,
) -> TaskRun | Outcome:
    """Return the task run that submits the step which follows, or the outcome of the job if none does.

    Args:
        operator: The operator, with its fields rendered.
        context: The task's context.
        event: The event of the trigger that followed the step.
        finished: What the log of the step has shown, and its outcome.
        reports: What the steps have reported.
        hand_over_after: Seconds until the next step is handed to the triggerer.

    Raises:
        AirflowFailException: The input or the connection is wrong.
    """
    from dstack_core import Progress, RunFinished
    from dstack_core.integration import RunRef, StepSums, format_usd, step_ref

    known, outcome = event.get("steps"), finished.outcome
    fallbacks = fallbacks_of(operator) if known else None
    if known is None or fallbacks is None:
        return outcome
    first, number = RunRef(**known["first"]), int(known["number"])
    sums, ended = StepSums.from_dict(known), RunFinished(Progress(outcome.run_name), outcome)
    if fallbacks.step_after(number, outcome) is not None:
        shown = {**finished.relayed, "reported": reports.state()}
        resumed = Resumed(step_ref(first, number), shown, known.get("deadline"))
        operator.before_submission(context)
        task_run = task_run_of(operator, context, hand_over_after, resumed)
        ladder = task_run.options.ladder
        if ladder is not None and ladder.steps is not None:
            ladder.steps.start(first, number, sums)
            if (last := ladder.end(ended)) is None:
                return task_run
            outcome = last.outcome
        task_run.close()
    else:
        sums.add(outcome)
        outcome = sums.of_all(outcome)
    if number > 1:
        operator.log.info("All steps together cost %s.", format_usd(outcome.cost))
    return outcome
