"""The handle of a run of the async client: the twin of ``run``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self

from dstack_core import _adrive, clock
from dstack_core._flow.raw_log import ChunkOptions, LogChunk
from dstack_core._flow.retry import within
from dstack_core._run_base import RunBase
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import Event
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord, LogBytes
from dstack_core.models.reports import ReportLimits
from dstack_core.models.statuses import RunStatus
from dstack_core.models.stops import StopResult
from dstack_core.models.utilization import RunMetrics


class AsyncRun(RunBase[AsyncTransport]):
    """A handle to one run, from ``AsyncClient.runs``; its attributes are as of the last poll."""

    async def status(self) -> RunStatus:
        """Fetch the run and return its status. Raises ``RunNotFoundError`` and the other server errors."""
        return (await self.refresh())._snapshot.status

    async def refresh(self) -> Self:
        """Fetch the run and return it. Raises ``RunNotFoundError`` if it was deleted; the server errors."""
        snapshot = await _adrive.arun(self._operations.get(self.name, self.id), self._transport)
        if snapshot is None:
            raise RunNotFoundError(f"Run {self.name} no longer exists: {self.url}")
        self._snapshot = snapshot
        return self

    async def logs(
        self,
        start_time: datetime | None = None,
        follow: bool = False,
        poll_interval: float = 5.0,
        *,
        diagnose: bool = False,
        node: int | None = None,
    ) -> AsyncGenerator[LogBytes, None]:
        """Yield the log as bytes: what there is now, with ``follow`` everything until the run ends.

        The twin of ``Run.logs``. After ``attach()`` everything until the run ends is read.

        Args:
            start_time: Leave out what is older; a naive time is in this machine's time zone. Default: none.
            follow: Continue until the run ends.
            poll_interval: Seconds between two requests for more.
            diagnose: Read the log of the job's runner instead.
            node: Read one node of a task on several, counted from 0. Default: all.

        Yields:
            ``LogBytes``, which know their node, replica and attempt.

        Raises:
            ConfigurationError: The run does not have that node.
            ServerError: The server errors.

        Example::

            async for chunk in run.logs(follow=True):
                sys.stdout.buffer.write(chunk)
        """
        options = ChunkOptions(start_time, follow, poll_interval, diagnose, node)
        flow = self._chunks(options)
        async for event in _adrive.aiterate(flow, self._transport):
            if isinstance(event, LogChunk):
                yield event.data

    def follow(
        self,
        progress: Progress | None = None,
        *,
        timeout: float | None = None,
        poll_interval: float = 5.0,
        logs: bool = True,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        report_limits: ReportLimits | None = None,
        timestamps: bool = False,
        waiting_interval: float | None = 60.0,
        through_hold: bool = False,
        utilization: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Yield the run's events until it has finished; the last is ``RunFinished`` with the ``Outcome``.

        Each poll fetches the status. A log that shows nothing new is read less and less often, at most
        15 seconds apart (a minute with a ``SharedAsyncClient``). Leaving the iteration does not stop the run.

        Args:
            progress: The ``progress`` of an earlier event, here or in another process; the next event is the
                one after it. Default: from the start.
            timeout: Time limit of everything in seconds, requests included. None: no limit.
            poll_interval: Seconds between two status requests.
            logs: Whether to read the log.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: An async function of seconds, instead of ``asyncio.sleep``; with it a ``SharedAsyncClient``
                polls whenever a sleep has ended. What it raises ends the iteration.
            report_limits: The limits on what the run reports. Default: 1 MiB a message, 1000 a second.
            timestamps: Whether ``LogLines`` have the time at which the server logged each line.
            waiting_interval: Seconds between two reports on what a run waits for before it starts; each may
                cost a request for the server's events. None: no reports.
            through_hold: Also follow a run with ``debug_on_failure`` while its container is held, until it
                ends. Default: such a run has finished, for this method, once its commands have failed.
            utilization: Whether the outcome shows how busy GPUs, CPUs and memory were: a request for each
                node at the end, and one every 45 minutes.

        Yields:
            ``StatusChanged``, ``Waiting``, ``LogLines``, ``PartialLine``, ``Reported``, ``ReportsDropped``,
            ``ContactLost``, ``ContactRestored``, and last ``RunFinished``.

        Raises:
            WaitTimeoutError: ``timeout`` passed; the run keeps running.
            ServerUnreachableError: The retry budget is used up; the run keeps running.
            ServerError: Any other refusal, such as ``RunNotFoundError``.

        Example::

            async for event in run.follow():
                if isinstance(event, LogLines):
                    print(*event.lines, sep="\\n")
        """
        flow = self._follow(
            progress,
            timeout=timeout,
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
            sleep=sleep,
            report_limits=report_limits,
            timestamps=timestamps,
            waiting_interval=waiting_interval,
            through_hold=through_hold,
            utilization=utilization,
        )
        return _adrive.aiterate(flow, self._transport, sleep or clock.asleep, self._waits(sleep))

    async def wait(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Outcome:
        """Wait until the run has finished and return its ``Outcome``: the twin of ``Run.wait``.

        A failed run raises nothing here; ``outcome.raise_for_status()`` does.

        Args:
            timeout: Seconds to wait, None for no limit. Requests end with it, too.
            poll_interval: Seconds between two status requests.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: An async function of seconds, instead of ``asyncio.sleep``; what it raises ends the wait.
            on_event: Gets the events. Default: the ``dstack_core`` logger reports lost contact.

        Raises:
            WaitTimeoutError: The timeout passed; the run keeps running.
            ServerUnreachableError: The retry budget is used up; the run keeps running.
            ServerError: Any other refusal, such as ``RunNotFoundError``.
        """
        flow = self._wait(poll_interval=poll_interval, retry_budget=retry_budget)
        limited = within(flow, self._limit(timeout, "had not finished"))
        return await _adrive.arun(limited, self._transport, sleep, on_event, self._waits(sleep))

    async def result(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
        report_limits: ReportLimits | None = None,
    ) -> Any:
        """Wait until the run has finished and return the result that it reported.

        A run reports a result with ``$DSTACK_RESULT_FILE`` or ``dstack_report.result`` (submit it with
        ``reports=True``), or with a line of its own; the last one counts.

        Args:
            timeout: Seconds to wait, None for no limit. Requests end with it, too.
            poll_interval: Seconds between two status requests.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: An async function of seconds, instead of ``asyncio.sleep``; what it raises ends the wait.
            on_event: Gets the events. Default: the ``dstack_core`` logger reports lost contact.
            report_limits: The limits on what the run reports. Default: 1 MiB a message, 1000 a second.

        Returns:
            The result: values that JSON has.

        Raises:
            RunError: The run did not succeed.
            NoResultError: The run succeeded and reported no result.
            WaitTimeoutError: The timeout passed; the run keeps running.
            ServerUnreachableError: The retry budget is used up; the run keeps running.
            ServerError: Any other refusal, such as ``RunNotFoundError``.

        Example:
            ``score = (await run.result(timeout=3600))["score"]``
        """
        flow = self._follow(
            None,
            poll_interval=poll_interval,
            logs=True,
            retry_budget=retry_budget,
            report_limits=report_limits,
            late_result=True,
        )
        limited = within(flow, self._limit(timeout, "had not finished"))
        outcome = await _adrive.arun(limited, self._transport, sleep, on_event, self._waits(sleep))
        return outcome.read_result()

    async def is_held(self) -> bool:
        """Return whether the run's commands have failed and its container is held for a shell.

        Only of a run with ``debug_on_failure``, whose log is read. Raises the server errors.
        """
        flow = self._operations.is_held(self._snapshot)
        return await _adrive.arun(flow, self._transport)

    async def attach(
        self,
        ssh_identity_file: str | os.PathLike[str] | None = None,
        *,
        node: int = 0,
        timeout: float | None = None,
        poll_interval: float = 5.0,
    ) -> Self:
        """Wait until the run has started, log in to its container and forward its ports; return the run.

        The twin of ``Run.attach``. Logging in and reading live logs happen in threads; cancelling closes what
        was opened.

        Args:
            ssh_identity_file: The path of the private key to log in with. Default: the key of the client, the
                user's key on the server or ``~/.dstack/ssh/id_rsa``, whichever the run was submitted with.
            node: The node of a run on several, counted from 0; of a service the first running replica.
            timeout: Seconds to wait for the start. None: no limit.
            poll_interval: Seconds between two status requests.

        Raises:
            AttachError: The login failed; it names the hop, what failed and what to do.
            PortInUseError: A local port is taken.
            ConfigurationError: The key file cannot be used, or the run does not have that node.
            WaitTimeoutError: The run had not started within ``timeout``; it keeps running.
            ServerError: The server errors.

        Example::

            async with await run.attach():
                print(run.ports)
        """
        if self._attachment is None:
            flow = self._operations.attach(
                self.name, self.id, identity_file=ssh_identity_file, node=node, poll_interval=poll_interval
            )
            limited = within(flow, self._limit(timeout, "had not started"))
            self._snapshot, self._attachment = await _adrive.arun(limited, self._transport)
            # Also for a run that has finished and is not attached: ``logs()`` then reads everything.
            self._attach_asked = True
        return self

    async def detach(self) -> None:
        """Close the SSH tunnel and the local ports; the run keeps running: the twin of ``Run.detach``."""
        attachment, self._attachment, self._attach_asked = self._attachment, None, False
        if attachment is not None:
            # Closing waits for the tunnel's threads, which would block the event loop.
            await asyncio.to_thread(attachment.close)

    async def __aenter__(self) -> Self:
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            await self.detach()

    async def wait_until_ready(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> str:
        """Wait until the service answers and return its address: the twin of ``Run.wait_until_ready``.

        Args:
            timeout: Seconds to wait, None for no limit.
            poll_interval: Seconds between two polls.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: An async function of seconds, instead of ``asyncio.sleep``; what it raises ends the wait.

        Raises:
            RunError: The run ended before the service answered.
            WaitTimeoutError: ``timeout`` passed; the run keeps running.
            ConfigurationError: The run is not a service.
            ServerError: The server errors.
        """
        flow = self._operations.wait_until_ready(
            self.name, self.id, poll_interval=poll_interval, retry_budget=retry_budget
        )
        limited = within(flow, self._limit(timeout, "was not ready"))
        return await _adrive.arun(limited, self._transport, sleep)

    async def events(self, limit: int | None = None) -> list[EventRecord]:
        """Return what the server recorded of the run, oldest first: the twin of ``Run.events``.

        ``limit`` (int) is the number of newest records to return, None for all. Raises
        ``UnsupportedServerError`` on servers before 0.20.0, and the server errors.
        """
        return await _adrive.arun(self._operations.events(self.id, limit), self._transport)

    async def metrics(
        self, node: int | None = None, replica: int | None = None, limit: int | None = None
    ) -> RunMetrics:
        """Return what the run used of its machines: the twin of ``Run.metrics``.

        Args:
            node: Only jobs of that node, counted from 0. Default: all; each job is a request.
            replica: Only jobs of that replica, counted from 0. Default: all.
            limit: The number of newest values of each metric; None: all that the server keeps.

        Raises:
            RunNotFoundError: The run does not have that job.
            ServerError: The other server errors.
        """
        flow = self._operations.metrics(self._snapshot, node=node, replica=replica, limit=limit)
        return await _adrive.arun(flow, self._transport)

    async def stop(
        self,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> StopResult:
        """Stop the run and return what is known of it: the twin of ``Run.stop``.

        Args:
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None: the client's retry
                budget, and no limit for the end.
            sleep: An async function of seconds, instead of ``asyncio.sleep``.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.
        """
        flow = self._operations.stop(self._target, abort, until, timeout, self._check)
        return await _adrive.arun(flow, self._transport, sleep)

    def _waits(self, sleep: object) -> _adrive.AsyncWait | None:
        """Return the function that waits together with the other followers; None to wait alone."""
        shared = self._transport if isinstance(self._transport, SharedTransport) else None
        return shared.wait if shared is not None and sleep is None else None

    def _on_poll(self) -> Callable[[RunSnapshot], None] | None:
        # With thousands of handles, the snapshots of their polls would be most of the process's memory.
        return None if isinstance(self._transport, SharedTransport) else super()._on_poll()
