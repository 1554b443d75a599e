"""Bring a run's log and events into the run logger.

The problem: Prefect stores each log record as one row, and an execution that adopts a run follows it from its
first log line, whose log an earlier execution may have relayed already.

The idea: the core's ``LogRelay`` joins lines into few records. The last record of a run has a text of its
own; a process that adopts a run which has ended asks the flow run's log for them, and relays nothing if they
are there. Another process of the same task run (Dask and Ray repeat a task whose worker died) reads its log
back and leaves out the lines that are there. The log of another task run begins with the first line: each log
is whole.

Measured: a Prefect server on two cores stores about 450 records a second; lines joined by the hundred are
logged at 35,000 lines a second, single ones at 2,500.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._cancellation import quick_prefect_client

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Event, Outcome, Progress, Run
    from dstack_core.integration import Masker

# A record for each line would overload a Prefect server, which takes about 450 records a second from all its
# flow runs; 200 short lines still read well as one record of its UI.
_MAX_RECORD_LINES = 200
# That of ``dstack_core.integration``, which the module of a flow does not import; a test holds them equal.
DEFAULT_LOG_BUDGET = 10_000_000
# As many records as a Prefect server returns at once; more are refused, fewer cost more requests.
_PAGE = 200
# The last records of this process may still be on their way to the Prefect server.
_by_this_process: set[str] = set()


class Relay:
    """The log of a run in the run logger, and what is known of the run.

    ``logger`` is taken in the task, where the context is. ``stream_logs`` (bool): the log lines are relayed;
    the last ones are kept in any case. ``log_budget_bytes`` (int) is how much of the log is relayed at most,
    None all. ``relayed`` counts the lines that were logged before the run was followed again from its first
    line. ``masker`` knows the secrets. ``progress`` is the position in the run and its log, ``outcome`` the
    run's end, both None until known.
    """

    def __init__(
        self,
        logger: Any,
        *,
        stream_logs: bool,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        relayed: Counter[str] | None = None,
    ) -> None:
        # A flow's module is also imported where nothing runs, which must not load the client.
        from dstack_core.integration import LogRelay, RecordLimits

        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self._shows_end = False
        self._logger = logger
        self._log = LogRelay(
            limits=RecordLimits(max_lines=_MAX_RECORD_LINES),
            log_budget_bytes=log_budget_bytes,
            shows_log=stream_logs,
            already_logged=relayed,
        )

    @property
    def masker(self) -> Masker:
        """Return what masks the secrets."""
        return self._log.masker

    @property
    def tail(self) -> list[str]:
        """Return the last log lines."""
        return self._log.tail

    @property
    def shows_tail(self) -> bool:
        """Whether the last log lines were logged."""
        return self._log.shows_tail

    @property
    def stream_logs(self) -> bool:
        """Whether the log lines are relayed."""
        return self._log.shows_log

    @stream_logs.setter
    def stream_logs(self, value: bool) -> None:
        self._log.shows_log = value

    def note_page(self, url: str) -> None:
        """Remember the run's page, which is named where the log is not shown whole."""
        self._log.url = url

    def begin_run(self) -> None:
        """Begin with the log of another run of the same job."""
        self.progress = None
        self._log.begin_run("")

    def continues(self, run: Run | AsyncRun, flow_run_id: str | None, task_run_id: object) -> bool:
        """Return whether the log of an ended run lacks lines here, and begin with it if so."""
        outcome = run.outcome()
        if outcome is None or not self.stream_logs or was_relayed(outcome, flow_run_id, self._logger):
            return False
        lines = logged_lines(run, task_run_id, self._logger)
        self._logger.info("%s", start_record(run))
        self._log.begin_run(run.url)
        self._log.leave_out(lines)
        return True

    def handle(self, event: Event) -> None:
        """Log one event and remember the position behind it."""
        from dstack_core import RunFinished
        from dstack_core.integration import mask_result

        self.handle_contact(event)
        if isinstance(event, RunFinished):
            self.outcome = mask_result(event.outcome, self.masker.mask, self._logger.warning)
        self.progress = event.progress

    def take_over(self, run: Run | AsyncRun, flow_run_id: str | None, task_run_id: object) -> None:
        """Log that the run was submitted earlier, and leave out what its log here has already.

        An id is None outside of a flow run or a task run.
        """
        outcome = run.outcome()
        if outcome is not None and self.stream_logs:
            self.stream_logs = not was_relayed(outcome, flow_run_id, self._logger)
        how = "it is followed from its first log line on"
        if outcome is not None and not self.stream_logs:
            how = "its outcome is taken over"
        elif self.stream_logs and (lines := logged_lines(run, task_run_id, self._logger)):
            self._log.leave_out(lines)
            how = "its log continues behind the lines that are here"
        self._logger.info("An earlier execution of this flow run submitted it; %s", how)

    def log_end(self) -> None:
        """Log once, behind all lines, how the run ended, its time and cost, and how busy its machine was."""
        if self.outcome is None or self._shows_end:
            return
        self._shows_end = True
        self.log_end_of_step(self.outcome)

    def log_end_of_step(self, outcome: Outcome) -> None:
        """Log behind all lines of one run how it ended."""
        from dstack_core.integration import describe_outcome, utilization_lines

        for line in (describe_outcome(outcome), *utilization_lines(outcome)):
            self._logger.info("%s", line)
        remember_relayed(outcome)

    def handle_contact(self, event: Event) -> None:
        """Log one event: also those of a submission, which have no position."""
        for level, text in self._log.records(event):
            self._logger.log(level, "%s", text)


def _ending(outcome: Outcome) -> str:
    """Return what the record begins with that follows all lines of a run.

    Nothing else that is logged of a run has a comma there: not the result of a stop, nor a hook's report.
    """
    return f"Run {outcome.run_name} {outcome.message}, "


def remember_relayed(outcome: Outcome) -> None:
    """Remember that this process has relayed the run's log to its end."""
    _by_this_process.add(outcome.run_id)


def was_relayed(outcome: Outcome, flow_run_id: str | None, logger: Any) -> bool:
    """Whether the flow run's log holds the run's log to its end; false where that is unknown."""
    if outcome.run_id in _by_this_process:
        return True
    if flow_run_id is None:
        return False
    try:
        return _is_in_log(_ending(outcome), UUID(flow_run_id))
    except Exception as error:
        # Lines that are there twice are better than lines that are missing.
        logger.debug("Prefect did not return the log of this flow run: %s", error)
        return False


def _is_in_log(beginning: str, flow_run_id: UUID) -> bool:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    chosen, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), 0
    with quick_prefect_client() as client:
        # The latest first: records that arrive meanwhile shift the others, so that none is skipped.
        while page := client.read_logs(chosen, _PAGE, offset, LogSort.TIMESTAMP_DESC):
            offset += len(page)
            if any(log.message.startswith(beginning) for log in page):
                return True
    return False


def logged_lines(run: Run | AsyncRun, task_run_id: object, logger: Any) -> Counter[str]:
    """Return what the log of a task run holds since it began to follow the run; nothing where unknown."""
    try:
        return Counter() if task_run_id is None else _lines_since(start_record(run), UUID(str(task_run_id)))
    except Exception as error:
        # Lines that are there twice are better than lines that are missing.
        logger.debug("Prefect did not return the log of this task run: %s", error)
        return Counter()


def start_record(run: Run | AsyncRun) -> str:
    """Return the record with which each process begins to follow a run."""
    return f"Run {run.name}: {run.url}"


def _lines_since(beginning: str, task_run_id: UUID) -> Counter[str]:
    from prefect.client.schemas.filters import LogFilter, LogFilterTaskRunId
    from prefect.client.schemas.sorting import LogSort

    chosen, offset = LogFilter(task_run_id=LogFilterTaskRunId(any_=[task_run_id])), 0
    found: Counter[str] = Counter()
    has_begun = False
    with quick_prefect_client() as client:
        while page := client.read_logs(chosen, _PAGE, offset, LogSort.TIMESTAMP_ASC):
            offset += len(page)
            for log in page:
                # What an earlier try logged of another run may be equal.
                has_begun = has_begun or log.message == beginning
                if has_begun:
                    found.update(log.message.split("\n"))
    return found


# Which run logger gets the warnings of the client that this thread or async task uses.
_receiver: ContextVar[Any] = ContextVar("prefect_dstack_log", default=None)


class _ClientWarnings(logging.Handler):
    """A handler for all tasks of the process; each thread and each async task has its own receiver."""

    def emit(self, record: logging.LogRecord) -> None:
        if (logger := _receiver.get()) is not None:
            logger.log(record.levelno, "%s", record.getMessage())


_client_warnings = _ClientWarnings(level=logging.WARNING)


@contextmanager
def client_warnings_in(logger: Any) -> Iterator[None]:
    """Relay the client's warnings to ``logger``."""
    # A second addHandler of the same handler changes nothing.
    logging.getLogger("dstack_core").addHandler(_client_warnings)
    token = _receiver.set(logger)
    try:
        yield
    finally:
        _receiver.reset(token)
