"""Get the run of this try: take over that of the previous try, or submit a new one.

The problem: the worker may be lost, and the task may be ended, between any two requests. The next try, or the
stop, must then know which run there may be.

The idea is the order of the steps:

1. Decide about the run of the previous try, by ``_previous_try``.
2. Log the best offer. This request creates nothing, and shows early what the server refuses.
3. Write the record. From here on the next try knows what to look for if this worker is lost.
4. Aim at the run. From here on the end of the task stops it.
5. Make way for it where a service of that name is active.
6. Submit it, exactly once (PROTOCOL 1.4), and add the run's id to the record.

With ``fallbacks``, steps 2 to 6 are done again for each run that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from airflow_provider_dstack._previous_try import Decision, Ledger, Record, decide, previous_run
from airflow_provider_dstack._stop import OnKillAction, stop_task_run

if TYPE_CHECKING:
    from dstack_core import Client, Event, Outcome, Plan, RequestRejectedError, Run, RunFinished
    from dstack_core.integration import RunRef, Steps

OnActive: TypeAlias = Literal["update", "replace", "fail"]
# How a server answers a value that it cannot read (PROTOCOL 1.1); no other refusal proves that.
_UNREADABLE = 422
_OTHER_WAYS = {
    "fail": 'Or set on_active="update" or on_active="replace".',
    "update": 'Or set on_active="replace" to stop it and submit a new one.',
}

# The offers are only for the log, so a submission does not wait longer for them. With less, a log has no
# offers where the server takes long to collect them.
PLAN_SECONDS = 10.0


class Submitter(Protocol):
    """The task run that has a run submitted, and may be killed meanwhile."""

    def aim(self, ref: RunRef) -> None:
        """Mean this run from now on: a kill stops it. Raises when the kill has come."""

    def keep(self, why: str) -> None:
        """Leave the run running however the task ends."""

    def pause(self, seconds: float) -> None:
        """Sleep; raises when the kill comes."""


@dataclass(frozen=True)
class Submission:
    """What is submitted, and where; all of it happens in the worker thread.

    ``what`` are the arguments that ``runs.plan`` and ``runs.submit`` have in common, ``ledger`` is None
    for a task that is not durable. ``retry_budget`` and ``poll_interval`` in seconds. ``on_active`` is what
    happens to an active run of that name; None where the caller cannot choose. ``steps`` are those of a task
    with fallbacks.
    """

    client: Client
    what: dict[str, Any]
    ref: RunRef
    verify_ports: bool
    ledger: Ledger | None
    on_kill_action: OnKillAction
    poll_interval: float
    retry_budget: float
    log: Any
    on_active: OnActive | None = None
    steps: Steps | None = None

    def obtain(self, submitter: Submitter) -> Run:
        """Return the run to follow. Raises ``ConfigurationError`` and the server errors."""
        submitter.aim(self.ref)
        target = self.ref
        # An update is declared by its result: it turns the run of the previous try into what is wanted now.
        if self.ledger is not None and self.on_active != "update":
            target, taken_over = self._take_over(self.ledger, submitter)
            self._start_at(target, self.ledger, submitter)
            if taken_over is not None:
                return taken_over
        if self.steps is None or self.steps.number == 1:
            return self._submit_target(target, submitter)
        return self._continue(target, self.steps, submitter)

    def counted(self, event: Event) -> Event:
        """Return an event of the step that is followed, whose attempt counts on from the steps before."""
        return event if self.steps is None else self.steps.counted(event)

    def end(self, event: RunFinished) -> RunFinished | None:
        """Return the end of the task's job after the end of a run, None if another step follows."""
        return event if self.steps is None else self.steps.end(event, None)

    def obtain_next(self, submitter: Submitter) -> Run | RunFinished:
        """Submit the step that follows, or return the end if ``max_cost`` does not pay for it."""
        from dstack_core import ConfigurationError

        steps = self.steps
        assert steps is not None  # noqa: S101 - without steps, `end` returns one
        self.log.info("%s", steps.describe())
        try:
            return self._submit_target(steps.begin(), submitter)
        except ConfigurationError as error:
            return steps.refused(error)

    def _start_at(self, target: RunRef, ledger: Ledger, submitter: Submitter) -> None:
        """Begin with the step that ``target`` is; the steps before it are in another try's log."""
        from dstack_core.integration import split_step

        steps = self.steps
        if steps is None:
            return
        steps.start(ledger.names.first_of(target), split_step(target.marker)[1])
        for ref in steps.before():
            run = self.client.runs.get(ref.name, retry_budget=self.retry_budget, sleep=submitter.pause)
            steps.add_earlier(ref, run)

    def _continue(self, target: RunRef, steps: Steps, submitter: Submitter) -> Run:
        """Submit a later step of the previous try; if ``max_cost`` does not pay for it, step 1 of this."""
        from dstack_core import ConfigurationError

        why = "max_cost is spent"
        if steps.is_paid_for:
            self.log.info("This try continues the previous one. %s", steps.describe())
            try:
                return self._submit_target(target, submitter)
            except ConfigurationError as error:
                why = error.message
        self.log.info("Run %s is not submitted: %s. This try begins anew.", target.name, why.rstrip("."))
        steps.start(self.ref)
        return self._submit_target(self.ref, submitter)

    def _submit_target(self, target: RunRef, submitter: Submitter) -> Run:
        refusal = self._log_plan(target)
        if self.ledger is not None:
            # Before the submission: whenever this worker is lost, the next try knows what to look for.
            self.ledger.write(target)
        submitter.aim(target)
        updates = self.on_active in ("update", "replace") and self._make_way(target, submitter)
        run = self._submit(target, submitter)
        if refusal is not None:
            self.log.warning("Could not get offers for run %s: %s.", target.name, refusal)
        if updates:
            self.log.info("Run %s has the new configuration.", run.name)
        if self.ledger is not None:
            self.ledger.write(target, run.id)
        return run

    def _submit(self, target: RunRef, submitter: Submitter) -> Run:
        from dstack_core import RunNameTakenError, RunNotUpdatableError

        runs = self.client.runs
        try:
            return (runs.apply if self.on_active == "update" else runs.submit)(
                **self._arguments(),
                run_name=target.name,
                verify_ports=self.verify_ports,
                marker=target.marker,
                retry_budget=self.retry_budget,
                sleep=submitter.pause,
            )
        except (RunNameTakenError, RunNotUpdatableError) as error:
            if self.on_active not in _OTHER_WAYS:
                raise
            raise type(error)(f"{error.message} {_OTHER_WAYS[self.on_active]}") from None

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of the step that is submitted."""
        if self.steps is None:
            return self.what
        return {"configuration": self.what["configuration"], **self.steps.options}

    def _make_way(self, target: RunRef, submitter: Submitter) -> bool:
        """Stop an active run of that name and wait for its end; return True for one to update instead."""
        from airflow_provider_dstack._names import run_ref

        found = self.client.runs.get(target.name)
        if found is None or found.outcome() is not None or found.marker == target.marker:
            return False
        if not found.last_status.is_stopping:
            if self.on_active == "update":
                self.log.info("Updating run %s, which is active: %s", found.name, found.url)
                submitter.keep("it was active before this task, which updates it")
                return True
            self.log.info("Run %s is active and is stopped: on_active is 'replace'.", found.name)
            self._stop(run_ref(found.name, found.marker or ""), found)
        self.log.info("Waiting for the end of run %s.", found.name)
        self._ended(found, submitter)
        return False

    def _take_over(self, ledger: Ledger, submitter: Submitter) -> tuple[RunRef, Run | None]:
        """Return the run of the previous try if this try follows it, else what to submit and None."""
        fallbacks = None if self.steps is None else self.steps.fallbacks
        found = previous_run(ledger, self.client, fallbacks)
        if found is None or found[0].run == self.ref:
            return self.ref, None
        record, run = found
        ref, name, number = record.run, record.run_name, record.try_number
        while True:
            if run is not None and run.holds_on_failure and run.is_held():
                # With a chosen name, a step of this try needs the name of that step.
                if ledger.names.first_of(ref).name != self.ref.name:
                    self.log.info(
                        "Run %s of try %s is held for a shell. This try submits a new run.", name, number
                    )
                    return self.ref, None
                submitter.aim(ref)
                self.log.info("Run %s of try %s is held, and this try needs its name.", name, number)
                self._stop(ref, run)
                run = self._ended(run, submitter)
            decision = decide(record, run, ledger.names, fallbacks)
            if decision is Decision.NEXT_STEP and run is not None and (outcome := run.outcome()) is not None:
                return self._step_after(ledger, record, outcome), None
            if decision is Decision.SUBMIT_AGAIN:
                return ref, None
            if decision is Decision.SUBMIT or run is None:
                return self.ref, None
            if decision is Decision.REATTACH:
                submitter.aim(ref)
                ledger.write(ref, run.id)
                self.log.info("Run %s of try %s is taken over.", name, number)
                return ref, run
            if decision is Decision.REPLACE and self.on_kill_action == "keep":
                self.log.warning("Run %s of try %s keeps running: on_kill_action is 'keep'.", name, number)
                return self.ref, None
            submitter.aim(ref)
            if decision is Decision.REPLACE:
                self.log.info("The task was cleared, so run %s of try %s is stopped.", name, number)
                self._stop(ref, run)
            self.log.info("Waiting for the end of run %s of try %s.", name, number)
            run = self._ended(run, submitter)

    def _step_after(self, ledger: Ledger, record: Record, outcome: Outcome) -> RunRef:
        """Return the step that follows a run of the previous try, which was lost before it submitted that."""
        from dstack_core.integration import step_ref

        following = None if self.steps is None else self.steps.fallbacks.step_after(record.step, outcome)
        return self.ref if following is None else step_ref(ledger.names.first_of(record.run), following)

    def _stop(self, ref: RunRef, run: Run) -> None:
        """Stop the run of the previous try. Raises when it keeps running: two runs would be paid for."""
        from dstack_core import DstackError
        from dstack_core.integration import describe_stop

        result = stop_task_run(self.client, ref, action=self.on_kill_action, run_id=run.id, log=self.log)
        if not result.is_safe:
            raise DstackError(describe_stop(result))

    def _ended(self, run: Run, submitter: Submitter) -> Run | None:
        """Return the run once it has ended, None when it was deleted."""
        from dstack_core import RunNotFoundError

        try:
            # Following repeats a stop that the server dropped.
            for _ in run.follow(
                poll_interval=self.poll_interval,
                logs=False,
                retry_budget=self.retry_budget,
                sleep=submitter.pause,
                waiting_interval=None,
            ):
                continue
            run.refresh()
        except RunNotFoundError:
            return None
        return run

    def _log_plan(self, target: RunRef) -> RequestRejectedError | None:
        """Log the best offer; without one the run is submitted anyway. Raises what a submission would.

        A refused plan is returned: the server refuses the submission for the same reason, and that error is
        the one to report. A value that the server cannot read (422) is not submitted.
        """
        from airflow_provider_dstack._outcome import FLEET_OPTION
        from dstack_core import (
            AccessDeniedError,
            AuthenticationError,
            ConfigurationError,
            ProjectNotFoundError,
            RequestRejectedError,
        )
        from dstack_core.integration import plan_hints

        try:
            plan = self.client.runs.plan(**self._arguments(), timeout=PLAN_SECONDS)
        except (AccessDeniedError, AuthenticationError, ConfigurationError, ProjectNotFoundError):
            raise
        except RequestRejectedError as error:
            if error.status == _UNREADABLE:
                raise
            return error
        except Exception as error:
            self.log.warning("Could not get offers for run %s: %s. Submitting anyway.", target.name, error)
            return None
        if plan.offers:
            self.log.info("Plan for run %s: %s.", target.name, _in_words(plan))
        else:
            waits = plan.waits_for_capacity
            # A run that does not wait fails at once, and its error has the hints.
            hints = f"{plan_hints(plan, fleet_option=FLEET_OPTION)} " if waits and plan.hints else ""
            self.log.warning(
                "Plan for run %s: no machine is on offer now. %sSubmitting anyway%s.",
                target.name,
                hints,
                ", since the run's retry policy waits for one" if waits else "",
            )
        return None


def _in_words(plan: Plan) -> str:
    from dstack_core.integration import format_price

    best = plan.offers[0]
    kind = "spot" if best.spot else "on-demand"
    offer = (
        f"best offer {best.instance} ({best.backend}, {best.region}, {kind}) "
        f"at {format_price(best.price_per_hour)}"
    )
    if plan.total_offers > 1:
        offer += f"; {plan.total_offers} offers, up to {format_price(plan.max_price_per_hour or 0)}"
    return offer
