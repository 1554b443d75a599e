"""What an embedded server has seen of each run, for the assertions of a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dstack_core.local.states import RUN_FINISHED

if TYPE_CHECKING:
    from dstack_core.local.runs import Run, Submission
    from dstack_core.local.state import State


@dataclass(frozen=True, slots=True)
class SeenRun:
    """A run as the server knows it.

    Attributes:
        name: Its name.
        id: Its id; a run that replaced a finished one of its name has another.
        status: Its status on the wire, such as ``running``, ``done``, ``failed`` or ``terminated``.
        reason: Why it ended, such as ``job_failed``; None before that.
        job_reasons: Why each attempt of its first job ended, oldest first, such as
            ``interrupted_by_no_capacity``; None for one that has not ended.
        marker: Which try of a task or flow run submitted it; "" for a script that gave none.
        configuration: The configuration as the client sent it. It may hold secrets.
        stop_requests: How many stop requests named it.
        log: The lines of its jobs, oldest attempt first.
        cost: USD so far.
        place: Where its first job got its latest machine, ``"BACKEND/REGION"`` such as ``aws/us-east-1``;
            None before it has one.
    """

    name: str
    id: str
    status: str
    reason: str | None
    job_reasons: tuple[str | None, ...]
    marker: str
    configuration: Mapping[str, Any] = field(repr=False)
    stop_requests: int
    log: tuple[str, ...] = field(repr=False)
    cost: float
    place: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return self.status in RUN_FINISHED

    @property
    def stopping(self) -> bool:
        """Whether the run is being stopped."""
        return self.status == "terminating"

    @property
    def attempts(self) -> int:
        """How often the server started its first job."""
        return len(self.job_reasons)

    def __str__(self) -> str:
        reasons = [reason or "not ended" for reason in self.job_reasons]
        why = f", {self.reason}" if self.reason else ""
        return f"{self.name}: {self.status}{why} (attempts: {', '.join(reasons)})"


def seen_runs(state: State) -> list[SeenRun]:
    """Return the runs of a state, oldest first; callable from any thread."""
    return [_seen(state, run) for run in list(state.runs.values())]


def _seen(state: State, run: Run) -> SeenRun:
    jobs = [list(job.submissions) for job in list(run.jobs)]
    texts = [state.logs.text(run.name, submission.id) for job in jobs for submission in job]
    return SeenRun(
        name=run.name,
        id=run.id,
        status=run.status,
        reason=run.termination_reason,
        job_reasons=tuple(one.termination_reason for one in jobs[0]) if jobs else (),
        marker=run.spec.configuration_path or "",
        configuration=run.submitted,
        stop_requests=run.stop_requests,
        log=tuple(line for text in texts for line in text.decode(errors="replace").splitlines()),
        cost=run.cost(),
        place=_place(jobs[0][-1]) if jobs else None,
    )


def _place(submission: Submission) -> str | None:
    data = submission.provisioning_data
    return None if data is None else f"{data['backend']}/{data['region']}"
