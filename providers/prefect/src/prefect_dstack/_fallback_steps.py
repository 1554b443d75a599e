"""The steps of a job with fallbacks, as a task shows and follows them: what sync and async code share.

The problem: the run of a step that ended is not the end of its task. Artifacts and events must not report it
as one, the next run belongs to the same log and the same outcome, and a cancellation may come at any moment
between the two.

The idea: ``dstack_core`` decides which step follows and sums up (``Steps``); this file changes the job from
one run to the next. A process that takes over finds the newest step; what the log of its flow run lacks of
the steps before is relayed first.

Invariants: between two steps ``job.attempt`` names the run that has ended, and from ``begin`` on the one that
is submitted. The final event and the outcome table are those of the last step, with the sums of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dstack_core.integration import Steps, StepSums, counted_on, mask_result, split_step

if TYPE_CHECKING:
    from dstack_core import (
        AsyncClient,
        AsyncRun,
        Client,
        ConfigurationError,
        Event,
        Outcome,
        Run,
    )
    from dstack_core.integration import Fallbacks, RunRef
    from prefect_dstack._job import Job


class JobSteps:
    """The steps of one job; ``fallbacks`` are what later ones are submitted with.

    Raises ``ConfigurationError`` if the input of any step is wrong.
    """

    def __init__(self, job: Job, client: Client | AsyncClient, fallbacks: Fallbacks) -> None:
        options = {name: value for name, value in job.spec.items() if name != "configuration"}
        self._job = job
        self._steps = Steps(client, job.spec["configuration"], job.attempt, fallbacks, options)
        self._earlier: list[Any] = []
        # The last run that the sums include.
        self._counted_id: str | None = None
        self._ended: Outcome | None = None
        self._shown = StepSums()

    @property
    def options(self) -> dict[str, Any]:
        """The options of the step that is submitted now."""
        return dict(self._steps.options)

    def found(self, newest: RunRef) -> None:
        """Make the newest step that has a run the one that the job means."""
        attempt = self._job.attempt
        if attempt.ref.marker != newest.marker:
            attempt.ref, attempt.run_id = newest, None
        attempt.step = split_step(newest.marker)[1]

    def start(self) -> list[RunRef]:
        """Begin with the step that the job's attempt names; return the steps before it."""
        attempt = self._job.attempt
        self._steps.start(attempt.first or attempt.ref, attempt.step)
        return self._steps.before()

    def add_earlier(self, ref: RunRef, run: Run | AsyncRun | None) -> None:
        """Count the run of an earlier step; one that was skipped or deleted has none."""
        self._steps.add_earlier(ref, run)
        if run is not None and run.marker == ref.marker and run.outcome() is not None:
            self._earlier.append(run)

    def log_next(self) -> None:
        """Log which step is submitted, if it is a later one."""
        if self._steps.number > 1:
            self._job.logger.info("%s", self._steps.describe())

    def runs_to_relay(self) -> Iterator[Any]:
        """Yield the runs of earlier steps whose log is not in that of the flow run, once begun there."""
        job, self._shown = self._job, StepSums()
        for run in self._earlier:
            job.hide_env(run)
            if job.relay.continues(run, job.flow_run_id, job.task_run_id):
                yield run
            self._shown.add(run.outcome())

    def take_earlier(self, event: Event) -> None:
        """Log an event of an earlier step."""
        from dstack_core import RunFinished

        if isinstance(event, RunFinished):
            self._job.relay.log_end_of_step(event.outcome)
        else:
            self._job.relay.handle_contact(counted_on(event, self._shown.count))

    def take(self, event: Event) -> Event | None:
        """Return an event as one of the whole job; None for the end of a step that another one follows."""
        from dstack_core import RunFinished

        if not isinstance(event, RunFinished):
            return self._steps.counted(event)
        outcome, is_new = event.outcome, event.outcome.run_id != self._counted_id
        self._counted_id = outcome.run_id
        # After a stop nothing follows, however the run ended.
        if self._job.stopped is not None:
            if is_new:
                self._steps.sums.add(outcome)
            return replace(event, outcome=self._steps.sums.of_all(outcome))
        ended = self._steps.end(event, None)
        if ended is None:
            self._ended = mask_result(outcome, self._job.relay.masker.mask, self._job.logger.warning)
            self._job.relay.log_end_of_step(self._ended)
        return ended

    @property
    def has_next(self) -> bool:
        """Whether a step has to be submitted."""
        return self._ended is not None

    def show_end(self) -> None:
        """Show in Prefect that the run of a step has ended; asks the Prefect server."""
        if self._ended is not None:
            self._job.report.end_of_step(self._ended)

    def begin(self) -> None:
        """Turn the job to the next run."""
        job = self._job
        self._ended = None
        self._steps.begin()
        job.attempt.is_adopted = False
        job.relay.begin_run()
        self.log_next()

    def refused(self, error: ConfigurationError) -> None:
        """End the job if ``max_cost`` pays for no further step, else raise."""
        self._job.show(self._steps.refused(error))
