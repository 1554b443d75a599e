"""The fallbacks of a work pool: what the next machine of a flow run has, if one was lost or not found.

The problem: a flow run is executed again on a machine of its own, by whichever worker gets it. That worker
may not have seen the machines before.

The idea: the machines of a flow run are numbered, and what follows one depends on its end alone. A worker
that submits or watches a machine reads the ends of those before it, and each comes to the same step.

The invariant: a step is never repeated for its end. A flow run that is executed again for another reason,
such as an interruption in the last step, stays at its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from dstack_core import AsyncClient, AsyncRun, Outcome
    from dstack_core.integration import AttemptNames, Fallbacks
    from prefect_dstack._submission import Submission


@dataclass(frozen=True, slots=True)
class MachineStep:
    """The step of a machine, and what those before it have cost (USD); ``max_cost`` is for all of them."""

    fallbacks: Fallbacks
    number: int = 1
    cost: float = 0.0
    max_cost: float | None = None

    def after(self, outcome: Outcome) -> MachineStep | None:
        """Return the step after a machine that has ended, None if none follows."""
        following = self.fallbacks.step_after(self.number, outcome)
        cost = self.cost + outcome.cost
        if following is None or (self.max_cost is not None and cost >= self.max_cost):
            return None
        return MachineStep(self.fallbacks, following, cost, self.max_cost)

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from those of the first machine."""
        changes = dict(self.fallbacks.changes(self.number))
        if self.number > 1 and self.max_cost is not None:
            changes["max_cost"] = self.max_cost - self.cost
        return changes

    def __str__(self) -> str:
        return f"step {self.number} of {self.fallbacks.last}, with {self.fallbacks.describe(self.number)}"


def check_steps(
    client: AsyncClient, submission: Submission, names: AttemptNames, fallbacks: Fallbacks
) -> None:
    """Raise ``ConfigurationError`` if the input of any step is wrong; makes no request."""
    from dstack_core.integration import Attempt, Steps

    Steps(client, submission.configuration, Attempt(names.ref(1)), fallbacks, submission.arguments)


async def step_of(
    client: AsyncClient,
    names: AttemptNames,
    number: int,
    fallbacks: Fallbacks,
    max_cost: float | None,
) -> MachineStep:
    """Return the step of the machine of that number. Raises the server errors."""
    step = MachineStep(fallbacks, max_cost=max_cost)
    for earlier in range(1, number):
        run = await client.runs.get(names.ref(earlier).name)
        outcome = None if run is None or names.number_of(run.marker) != earlier else run.outcome()
        if outcome is not None:
            # Executed again for another reason: the step stays, and so does its own limit.
            step = step.after(outcome) or step
    return step


async def step_after(
    client: AsyncClient, names: AttemptNames, run: AsyncRun, outcome: Outcome, variables: Mapping[str, Any]
) -> MachineStep | None:
    """Return the step that follows a machine that has ended; ``variables`` are those of ``step_of``."""
    number = names.number_of(run.marker)
    if number is None:
        return None
    return (await step_of(client, names, number, **variables)).after(outcome)


def may_continue(flow_run: FlowRun | None) -> bool:
    """Whether the flow run has not ended, or only because its machine did."""
    state = None if flow_run is None else flow_run.state
    return state is not None and not state.is_cancelling() and (state.is_crashed() or not state.is_final())
