"""Get the run of this try: take over that of the try before, or submit a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dstack._durable import Decision, Ledger, Record, decide, previous_run
from airflow_provider_dstack._names import RunId
from airflow_provider_dstack._stop import OnKillAction

if TYPE_CHECKING:
    from dstack_core import Client, Plan, Run

# A plan is only for the log: its limits, in seconds.
PLAN_LIMITS: dict[str, float] = {"timeout": 10.0, "connect_timeout": 2.0, "retry_budget": 1.0}


class Submitter(Protocol):
    """Be who has a run submitted, and may be killed meanwhile."""

    def aim(self, run: RunId) -> None:
        """Say which run a kill has to stop from now on; raise when the kill has come."""

    def pause(self, seconds: float) -> None:
        """Sleep; raise when the kill comes."""


@dataclass(frozen=True)
class Submission:
    """Hold what is submitted, and where; all of it happens in the helper thread.

    ``what`` are the arguments that ``runs.plan`` and ``runs.submit`` have in common, ``ledger`` is None
    for a task that is not durable. ``retry_budget`` and ``poll_interval`` in seconds.
    """

    client: Client
    plan_client: Client
    what: dict[str, Any]
    run: RunId
    verify_ports: bool
    ledger: Ledger | None
    on_kill_action: OnKillAction
    poll_interval: float
    retry_budget: float
    log: Any

    def obtain(self, submitter: Submitter) -> Run:
        """Return the run to follow. Raises ``ConfigurationError`` and the server errors."""
        submitter.aim(self.run)
        target = self.run
        if self.ledger is not None:
            taken = self._take_over(self.ledger, submitter)
            if not isinstance(taken, RunId):
                return taken
            target = taken
        self._tell_plan(target)
        if self.ledger is not None:
            # Before the submission: whenever this worker is lost, the next try knows what to look for.
            self.ledger.write(target)
        submitter.aim(target)
        run = self.client.runs.submit(
            **self.what,
            run_name=target.name,
            verify_ports=self.verify_ports,
            marker=target.marker,
            retry_budget=self.retry_budget,
        )
        if self.ledger is not None:
            self.ledger.write(target, run.id)
        return run

    def _take_over(self, ledger: Ledger, submitter: Submitter) -> Run | RunId:
        """Return the run of the try before, or what to submit."""
        found = previous_run(ledger, self.client)
        if found is None or found[0].run == self.run:
            return self.run
        record, run = found
        while True:
            decision = decide(record, run, ledger.names)
            if decision is Decision.SUBMIT_AGAIN:
                return record.run
            if decision is Decision.SUBMIT or run is None:
                return self.run
            if decision is Decision.REATTACH:
                submitter.aim(record.run)
                ledger.write(record.run, run.id)
                self.log.info("Run %s of try %s is taken over", *_named(record))
                return run
            if decision is Decision.REPLACE and self.on_kill_action == "keep":
                self.log.warning("Run %s of try %s goes on: on_kill_action is 'keep'", *_named(record))
                return self.run
            submitter.aim(record.run)
            if decision is Decision.REPLACE:
                self.log.info("The task was cleared; run %s of try %s is stopped", *_named(record))
                run.stop(abort=self.on_kill_action == "abort")
            self.log.info("Waiting for the end of run %s of try %s", *_named(record))
            run = self._ended(run, submitter)

    def _ended(self, run: Run, submitter: Submitter) -> Run | None:
        """Return the run once it is over, None when it was deleted."""
        from dstack_core import RunNotFoundError

        try:
            # Following repeats a stop that the server forgot.
            for _ in run.follow(
                poll_interval=self.poll_interval,
                logs=False,
                retry_budget=self.retry_budget,
                sleep=submitter.pause,
            ):
                continue
            run.refresh()
        except RunNotFoundError:
            return None
        return run

    def _tell_plan(self, target: RunId) -> None:
        """Log the best offer; whatever goes wrong here is no reason not to submit."""
        from dstack_core import ConfigurationError

        try:
            plan = self.plan_client.runs.plan(**self.what)
        except ConfigurationError:
            raise
        except Exception as error:
            self.log.warning("The offers for run %s cannot be told: %s", target.name, error)
            return
        if plan.offers:
            self.log.info("Plan for run %s: %s", target.name, _in_words(plan))
        else:
            self.log.warning(
                "Plan for run %s: no machine is on offer now; it is submitted all the same, since a retry "
                "policy may wait for one",
                target.name,
            )


def _in_words(plan: Plan) -> str:
    best = plan.offers[0]
    kind = "spot" if best.spot else "on-demand"
    told = (
        f"best offer {best.instance} ({best.backend}, {best.region}, {kind}) "
        f"at {best.price_per_hour:g} USD per hour"
    )
    if plan.total_offers > 1:
        told += f"; {plan.total_offers} offers, up to {plan.max_price_per_hour or 0:g} USD per hour"
    return told


def _named(record: Record) -> tuple[str, int]:
    return record.run_name, record.try_number
