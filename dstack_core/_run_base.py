"""What the handles of a run have in common, sync and async: properties, checks and flows; no I/O.

A handle keeps the last ``RunSnapshot`` that a request of its own returned; every property reads it, so none
of them makes a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Generic, TypeVar

from dstack_core._attach.attachment import Attachment
from dstack_core._flow.hold import without_log
from dstack_core._flow.raw_log import ChunkOptions
from dstack_core._flow.retry import TimeLimit, within
from dstack_core._flow.steps import Flow
from dstack_core._flow.stop_options import Check, StopTarget
from dstack_core._operations import Operations
from dstack_core._wire.http_messages import time_of
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.models.options import check_callable, check_seconds
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.reports import ReportLimits
from dstack_core.models.statuses import RunStatus

TransportT = TypeVar("TransportT")


class RunBase(Generic[TransportT]):
    """The handle of one run; its attributes are as of the last poll."""

    def __init__(self, operations: Operations, transport: TransportT, snapshot: RunSnapshot) -> None:
        self._operations = operations
        self._transport = transport
        self._snapshot = snapshot
        self._attachment: Attachment | None = None
        self._attach_asked = False
        # The `with` blocks that are open: the tunnel is closed at the end of the outermost.
        self._entered = 0
        # Whether this client submitted the run, so that the name was its own when it was last seen. Then a
        # check of the name that gets no reply does not prevent a stop.
        self._is_own = False
        self._reported: Outcome | None = None
        # Whether it was followed until its commands had failed and its container was held.
        self._is_held = False

    @property
    def is_attached(self) -> bool:
        """Whether ``attach()`` opened a tunnel that ``detach()`` has not closed yet."""
        return self._attachment is not None

    @property
    def ports(self) -> Mapping[int, int]:
        """The local port of each port of the container while the run is attached, else empty.

        The local ports are those of 127.0.0.1.
        """
        return {} if self._attachment is None else self._attachment.ports

    @property
    def name(self) -> str:
        """The run's name, unique within the project."""
        return self._snapshot.name

    @property
    def id(self) -> str:
        """The run's id (a UUID), which no other run ever has."""
        return self._snapshot.id

    @property
    def url(self) -> str:
        """The address of the run's page on the server, with the client's ``ui_url``."""
        return self._operations.api.run_url(self.id)

    @property
    def logs_url(self) -> str:
        """The address of the page with the run's log; servers before 0.19.27 show it on the run's page."""
        return f"{self.url}/logs" if self._snapshot.has_pages else self.url

    @property
    def metrics_url(self) -> str | None:
        """The address of the page with the run's metrics; None for a server without one."""
        return f"{self.url}/metrics" if self._snapshot.has_pages else None

    @property
    def browser_service_url(self) -> str | None:
        """The ``service_url`` as browsers reach it, which differs if the client has a ``ui_url``."""
        url = self.service_url
        return None if url is None else self._operations.api.browser_url(url)

    @property
    def marker(self) -> str | None:
        """What the owner wrote on the run when it was submitted, or None."""
        return self._snapshot.marker

    @property
    def last_status(self) -> RunStatus:
        """The run's status as of the last poll, among the documented ones; makes no request.

        A poll is each request for the run by this object: ``status``, ``refresh``, ``wait``, ``follow``, or
        what it came from. With a ``SharedAsyncClient`` following does not count.
        """
        return self._snapshot.status

    @property
    def raw_status(self) -> str:
        """The status in the server's own word, as of the last poll."""
        return self._snapshot.raw_status

    @property
    def status_message(self) -> str | None:
        """The server's detail on the status (``"exited (7)"``), as of the last poll, or None."""
        return self._snapshot.message

    @property
    def termination_reason(self) -> str | None:
        """Why the run ends or ended, in the server's own word (PROTOCOL 1.6), or None."""
        return self._snapshot.reason

    @property
    def error(self) -> str | None:
        """The server's own text for what went wrong with the run, or None."""
        return self._snapshot.error

    @property
    def cost(self) -> float:
        """What the run has cost (USD), as of the last poll."""
        return self._snapshot.cost

    @property
    def submitted_at(self) -> datetime:
        """When the run was submitted (aware)."""
        return time_of(self._snapshot.submitted_at)

    @property
    def deployment_num(self) -> int:
        """How many times the run was updated in place, as of the last poll (PROTOCOL 1.4)."""
        return self._snapshot.deployment

    @property
    def service_url(self) -> str | None:
        """The whole address at which a service answers; None for a run that is not a service.

        Unless the service was submitted with ``auth=False``, requests need the header
        ``Authorization: Bearer TOKEN`` with the token of a project member. Source: PROTOCOL 1.9.
        """
        service = self._snapshot.service
        return self._operations.api.absolute(service.url) if service else None

    @property
    def service_model(self) -> str | None:
        """The name of the model that the service answers for, or None."""
        return self._snapshot.service.model if self._snapshot.service else None

    @property
    def service_model_url(self) -> str | None:
        """The base address of the model's OpenAI-compatible API, or None without a model."""
        url = self._snapshot.service.model_url if self._snapshot.service else None
        return self._operations.api.absolute(url) if url else None

    @property
    def env(self) -> Mapping[str, str]:
        """The environment variables that the run was submitted with; their values may be secrets."""
        return self._snapshot.env

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags that the run was submitted with; empty on servers before 0.19.5."""
        return self._snapshot.tags

    def outcome(self) -> Outcome | None:
        """Return how the run ended, or None if it had not finished as of the last poll.

        It has what the run reported if this object has followed the run to its end.
        """
        if self._snapshot.is_active:
            return None
        return self._with_reports(outcome_of(self._snapshot, self.url))

    def __repr__(self) -> str:
        kind, status = type(self).__name__, str(self._snapshot.status)
        return f"{kind}(name={self.name!r}, id={self.id!r}, status={status!r})"

    def _follow(
        self,
        progress: Progress | None,
        *,
        poll_interval: float,
        logs: bool,
        retry_budget: float,
        timeout: float | None = None,
        sleep: object = None,
        report_limits: ReportLimits | None = None,
        late_result: bool = False,
        timestamps: bool = False,
        waiting_interval: float | None = None,
        through_hold: bool = False,
        utilization: bool = False,
    ) -> Flow[Outcome]:
        check_callable("sleep", sleep)
        check_seconds("timeout", timeout, above=True)
        follow = self._operations.follow(
            progress or Progress(self.name, self.id),
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
            on_poll=self._on_poll(),
            report_limits=report_limits,
            late_result=late_result,
            timestamps=timestamps,
            waiting_interval=waiting_interval,
            through_hold=through_hold,
            utilization=utilization,
        )
        flow = self._noting_reports(follow)
        limit = self._limit(timeout, "had not finished")
        # The limit bounds everything, the requests included: the last one gets no extra seconds.
        return flow if limit is None else within(flow, replace(limit, last_request=0.0))

    def _wait(self, *, poll_interval: float, retry_budget: float) -> Flow[Outcome]:
        """Follow the run without its log, unless that has to show that its container is held."""
        logs = self.holds_on_failure
        flow = self._follow(None, poll_interval=poll_interval, logs=logs, retry_budget=retry_budget)
        return without_log(flow) if logs else flow

    @property
    def holds_on_failure(self) -> bool:
        """Whether the run was submitted with ``debug_on_failure``."""
        return self._snapshot.hold_seconds is not None

    def _noting_reports(self, flow: Flow[Outcome]) -> Flow[Outcome]:
        """Keep what the run reported: a later ``outcome()`` or ``wait()`` does not read the log."""
        outcome = yield from flow
        self._is_held = bool(outcome.debug_command)
        if outcome.has_result or outcome.metrics or outcome.utilization is not None:
            self._reported = outcome
        return self._with_reports(outcome)

    def _with_reports(self, outcome: Outcome) -> Outcome:
        known = self._reported
        if known is None:
            return outcome
        usage = outcome.utilization or known.utilization
        outcome = replace(outcome, utilization=usage)
        return replace(outcome, result=known.result, metrics=known.metrics, has_result=known.has_result)

    def _on_poll(self) -> Callable[[RunSnapshot], None] | None:
        """Return the function that each poll of a follower passes the run to; None drops it."""
        return self._see

    def _see(self, snapshot: RunSnapshot) -> None:
        self._snapshot = snapshot

    def _limit(self, timeout: float | None, what: str) -> TimeLimit | None:
        check_seconds("timeout", timeout)
        if timeout is None:
            return None
        return TimeLimit(
            timeout, f"Run {self.name} {what} after {timeout:g} s", self.url, self._operations.clock
        )

    @property
    def _check(self) -> Check:
        return Check.IF_ANSWERED if self._is_own else Check.ALWAYS

    @property
    def _target(self) -> StopTarget:
        return StopTarget(self.name, self.marker, self.id)

    def _chunks(self, options: ChunkOptions) -> Flow[None]:
        """Read the log: live from the container of an attached run with one job, else from the server."""
        attachment = self._attachment
        # The runner sends one job's output as bytes, from the first one on. It cannot filter by time or node,
        # and its own log is on the server alone.
        plain = (options.start_time, options.diagnose, options.node) == (None, False, None)
        if attachment is not None and attachment.one_job and plain:
            return self._operations.live_chunks(
                self.name, self.id, attachment, poll_interval=options.poll_interval
            )
        follow = options.follow or self._attach_asked
        return self._operations.chunks(self.name, self.id, replace(options, follow=follow))
