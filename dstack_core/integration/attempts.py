"""The search for the run that belongs to this execution of a job, before anything is submitted.

The problem: a workflow engine executes the same job again: after a retry, after a crash, or because a user
requested it. Submitting without a check pays twice for what an earlier execution started.

The idea: all attempts of a job have names and markers that every execution computes alike. Attempt 1 is
looked up by name; what the server shows decides:

* no run of that name, or one of another owner: this attempt is submitted (the submission judges the other
  one);
* an active run, or one that succeeded: it is adopted;
* an active run whose commands have failed and whose container is held: as a run that failed. With a fixed
  name, which it still has, it is stopped first;
* a run that is stopping: it is polled until it has ended;
* a run that failed or was stopped: the next attempt is looked up in the same way.

An attempt without a run of its name is looked up under the name that an earlier version of the package gave
it, where an earlier execution may have had that version.

With fallbacks an attempt has several runs, one after the other, and the newest of them decides. If it ended
in a way after which another step follows, that step is what is submitted: the process that should have done
so was lost.

Invariant: ``Attempt.ref`` names, at any moment, the run that an interrupted caller has to stop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dstack_core._flow.hold import with_hold
from dstack_core._flow.steps import Sleep
from dstack_core._flow.stop_options import StopTarget, Until
from dstack_core._wire.runs import outcome_of
from dstack_core.integration.names import AttemptNames, RunRef, step_ref

if TYPE_CHECKING:
    from dstack_core._flow.steps import Flow
    from dstack_core._operations import Operations
    from dstack_core._wire.runs import RunSnapshot
    from dstack_core.aio import AsyncClient
    from dstack_core.aio_run import AsyncRun
    from dstack_core.client import Client
    from dstack_core.integration.fallbacks import Fallbacks
    from dstack_core.models.events import Event
    from dstack_core.run import Run

# Seconds between two polls of a stopping run, which needs 2 to 20 s to end (PROTOCOL 5.4). Shorter pauses
# only load the server; longer ones delay the submission.
_STOPPING_PAUSE = 2.0
# Seconds for the end of a held run whose name is needed: the runner kills it 10 s after the stop.
_HOLD_END_SECONDS = 120.0


@dataclass(slots=True)
class Attempt:
    """The run that an execution means, at any moment; the functions of this module keep it up to date.

    Attributes:
        ref: The run's name and marker. An interrupted caller stops this run. With fallbacks it is that of the
            newest step.
        run_id: The run's id (str), None until it is known.
        is_chosen: Whether the choice is final: no other attempt will be considered.
        is_adopted: Whether an earlier execution submitted the run.
        may_appear: Whether a submission is under way whose run the server may not show yet; the caller sets
            it.
        first: The identity of step 1 (``RunRef``) where ``ref`` is that of another step; else None.
        step: The number of the step that ``ref`` names.
    """

    ref: RunRef
    run_id: str | None = None
    is_chosen: bool = False
    is_adopted: bool = False
    may_appear: bool = False
    first: RunRef | None = None
    step: int = 1


def choose_attempt(
    client: Client,
    names: AttemptNames,
    attempt: Attempt,
    *,
    fallbacks: Fallbacks | None = None,
    max_cost: float | None = None,
    retry_budget: float | None = None,
    sleep: Callable[[float], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Run | None:
    """Choose the attempt of this execution; return its run if there is one to adopt, else None.

    Args:
        client: The client of the run's project.
        names: How the job's attempts are named.
        attempt: Begins with the first attempt's ``ref``; updated with every reply, for an interrupted caller.
        fallbacks: Those that the job is submitted with. Default: none.
        max_cost: USD that all steps together may cost: once it is spent, no step follows. Default: no limit.
        retry_budget: Seconds to retry an unreachable server in each request; None: the client's.
        sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the search.
        on_event: Gets the ``ContactLost`` and ``ContactRestored`` events; by default they are logged.

    Returns:
        The run of an earlier execution, active or successful. None if ``attempt.ref`` is to be submitted,
        which with fallbacks may be a later step.

    Raises:
        ServerError: The server errors.

    Example::

        attempt = Attempt(names.ref(1))
        run = choose_attempt(client, names, attempt)
        if run is None:
            run = client.runs.submit(task, attempt.ref.name, marker=attempt.ref.marker)

    Source: PROTOCOL 1.4.
    """
    from dstack_core import _drive
    from dstack_core.run import Run

    flow = _choose(client._operations, names, attempt, retry_budget, fallbacks, max_cost)
    found = _drive.run(flow, client._transport, sleep, on_event)
    return None if found is None else Run(client._operations, client._transport, found)


async def achoose_attempt(
    client: AsyncClient,
    names: AttemptNames,
    attempt: Attempt,
    *,
    fallbacks: Fallbacks | None = None,
    max_cost: float | None = None,
    retry_budget: float | None = None,
    sleep: Callable[[float], Awaitable[None]] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> AsyncRun | None:
    """Choose the attempt of this execution: the twin of ``choose_attempt``, which has the details.

    Args:
        client: The client of the run's project.
        names: How the job's attempts are named.
        attempt: Begins with the first attempt's ``ref``; updated with every reply, for an interrupted caller.
        fallbacks: Those that the job is submitted with. Default: none.
        max_cost: USD that all steps together may cost: once it is spent, no step follows. Default: no limit.
        retry_budget: Seconds to retry an unreachable server in each request; None: the client's.
        sleep: An async function of seconds, instead of ``asyncio.sleep``; what it raises ends the search.
        on_event: Gets the ``ContactLost`` and ``ContactRestored`` events; by default they are logged.

    Returns:
        The run of an earlier execution, active or successful. None if ``attempt.ref`` is to be submitted,
        which with fallbacks may be a later step.

    Raises:
        ServerError: The server errors.
    """
    from dstack_core import _adrive
    from dstack_core.aio_run import AsyncRun

    flow = _choose(client._operations, names, attempt, retry_budget, fallbacks, max_cost)
    found = await _adrive.arun(flow, client._transport, sleep, on_event)
    return None if found is None else AsyncRun(client._operations, client._transport, found)


def _choose(
    operations: Operations,
    names: AttemptNames,
    attempt: Attempt,
    retry_budget: float | None,
    fallbacks: Fallbacks | None = None,
    max_cost: float | None = None,
) -> Flow[RunSnapshot | None]:
    sought, wanted = 1, attempt.ref
    while True:
        found = yield from operations.get(wanted.name, retry_budget=retry_budget)
        # With a fixed name the run may be that of a later attempt, so its marker decides which one it is.
        number = None if found is None else names.number_of(found.marker)
        former = names.former_ref(sought) if found is None else None
        if former is not None:
            found = yield from operations.get(former.name, retry_budget=retry_budget)
            number = None if found is None else names.number_of(found.marker)
        if found is None or number is None:
            attempt.is_chosen = True
            return None
        # Before any sleep: a caller that is interrupted in it stops the run that was seen last.
        first = names.ref_of(number, found.name)
        attempt.ref, attempt.run_id = first, found.id
        attempt.first, attempt.step = None, 1
        following = None
        if fallbacks is not None:
            found, following = yield from _newest_step(
                operations, attempt, fallbacks, max_cost, found, retry_budget
            )
        is_held = yield from operations.is_held(found)
        if is_held and names.fixed_name is not None:
            target = StopTarget(found.name, found.marker, found.id)
            yield from operations.stop(target, False, Until.ENDED.value, _HOLD_END_SECONDS)
        elif found.status.is_stopping:
            yield Sleep(_STOPPING_PAUSE)
        elif not is_held and (found.is_active or found.status.is_success):
            attempt.is_chosen = attempt.is_adopted = True
            return found
        elif following is not None:
            attempt.ref, attempt.run_id = step_ref(first, following), None
            attempt.first, attempt.step = first, following
            attempt.is_chosen = True
            return None
        else:
            sought, wanted = number + 1, names.ref(number + 1)
            attempt.ref, attempt.run_id = wanted, None
            attempt.first, attempt.step = None, 1
            if names.fixed_name is not None:
                # The next attempt has the same name, which the run just seen still holds.
                attempt.is_chosen = True
                return None
            continue
        wanted = first


def _newest_step(
    operations: Operations,
    attempt: Attempt,
    fallbacks: Fallbacks,
    max_cost: float | None,
    found: RunSnapshot,
    retry_budget: float | None,
) -> Flow[tuple[RunSnapshot, int | None]]:
    """Return the newest run of an attempt, ``found`` or that of a later step, and which step follows it."""
    first, number = attempt.ref, 1
    if not _has_failed(found):
        return found, None
    cost = found.cost
    for later in range(2, fallbacks.last + 1):
        ref = step_ref(first, later)
        run = yield from operations.get(ref.name, retry_budget=retry_budget)
        # A step may have been skipped; with a fixed name, the run may be that of another attempt.
        if run is not None and run.marker == ref.marker:
            found, number = run, later
            cost += run.cost
            attempt.ref, attempt.run_id = ref, run.id
            attempt.first, attempt.step = first, later
    if not _has_failed(found):
        return found, None
    outcome = outcome_of(found, operations.api.run_url(found.id))
    outcome = yield from with_hold(operations.api, found, outcome, lambda: None)
    following = fallbacks.step_after(number, outcome)
    is_spent = max_cost is not None and cost >= max_cost
    return found, None if is_spent else following


def _has_failed(run: RunSnapshot) -> bool:
    return not (run.is_active or run.status.is_stopping or run.status.is_success)
