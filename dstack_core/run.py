"""The handle of a run of the sync client: one line a method over the shared flows."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self

from dstack_core import _drive, clock
from dstack_core._flow.raw_log import ChunkOptions, LogChunk
from dstack_core._flow.retry import within
from dstack_core._run_base import RunBase
from dstack_core._transport.blocking import BlockingTransport
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import Event
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord, LogBytes
from dstack_core.models.reports import ReportLimits
from dstack_core.models.statuses import RunStatus
from dstack_core.models.stops import StopResult
from dstack_core.models.utilization import RunMetrics


class Run(RunBase[BlockingTransport]):
    """A handle to one run, from ``client.runs``; its attributes are as of the last poll."""

    def status(self) -> RunStatus:
        """Fetch the run and return its status. Raises ``RunNotFoundError`` and the other server errors."""
        return self.refresh()._snapshot.status

    def refresh(self) -> Self:
        """Fetch the run and return it. Raises ``RunNotFoundError`` if it was deleted; the server errors."""
        snapshot = _drive.run(self._operations.get(self.name, self.id), self._transport)
        if snapshot is None:
            raise RunNotFoundError(f"Run {self.name} no longer exists: {self.url}")
        self._snapshot = snapshot
        return self

    def logs(
        self,
        start_time: datetime | None = None,
        follow: bool = False,
        poll_interval: float = 5.0,
        *,
        diagnose: bool = False,
        node: int | None = None,
    ) -> Generator[LogBytes, None, None]:
        """Yield the log as bytes: what there is now, with ``follow`` everything until the run ends.

        After ``attach()`` everything until the run ends is read: live from the container if the run has one
        job and only ``follow`` and ``poll_interval`` are passed, else the server's copy, which is seconds
        late. A connection that breaks on the way loses no byte and repeats none.

        Args:
            start_time: Leave out what is older; a naive time is in this machine's time zone. Default: none.
            follow: Continue until the run ends.
            poll_interval: Seconds between two requests for more.
            diagnose: Read the log of the job's runner instead.
            node: Read one node of a task on several, counted from 0. Default: all.

        Yields:
            ``LogBytes``, which know their node, replica and attempt. With one job, chunks are as the runner
            wrote them, live ones with their terminal escape sequences; with several they are whole lines, so
            that no line mixes two nodes. Lines end with ``\\r\\n``. All attempts of a retried job are read.

        Raises:
            ConfigurationError: The run does not have that node.
            ServerError: The server errors.

        Example::

            for chunk in run.logs(follow=True):
                sys.stdout.buffer.write(chunk)

        Source: the documented API, "attach()"; PROTOCOL 1.8, 4.6.
        """
        options = ChunkOptions(start_time, follow, poll_interval, diagnose, node)
        flow = self._chunks(options)
        for event in _drive.iterate(flow, self._transport):
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
        sleep: Callable[[float], None] | None = None,
        report_limits: ReportLimits | None = None,
        timestamps: bool = False,
        waiting_interval: float | None = 60.0,
        through_hold: bool = False,
        utilization: bool = False,
    ) -> Generator[Event, None, Outcome]:
        """Yield the run's events until it has finished; the generator returns its ``Outcome``.

        Each poll fetches the status. A log that shows nothing new is read less and less often, at most
        15 seconds apart. Leaving the iteration does not stop the run.

        Args:
            progress: The ``progress`` of an earlier event, here or in another process; the next event is the
                one after it. Default: from the start.
            timeout: Time limit of everything in seconds, requests included. None: no limit.
            poll_interval: Seconds between two status requests.
            logs: Whether to read the log.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the iteration.
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

            for event in run.follow():
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
        return _drive.iterate(flow, self._transport, sleep or clock.sleep)

    def wait(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Outcome:
        """Wait until the run has finished and return its ``Outcome``; a failed run raises nothing here.

        A run with ``debug_on_failure`` has finished once its commands have failed, although its container is
        held; ``outcome.debug_command`` is how to get in.

        Args:
            timeout: Seconds to wait, None for no limit. Requests end with it, too.
            poll_interval: Seconds between two status requests.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the wait.
            on_event: Gets the events. Default: the ``dstack_core`` logger reports lost contact.

        Returns:
            How the run ended.

        Raises:
            WaitTimeoutError: The timeout passed; the run keeps running.
            ServerUnreachableError: The retry budget is used up; the run keeps running.
            ServerError: Any other refusal, such as ``RunNotFoundError``.

        Example:
            ``run.wait(timeout=3600).raise_for_status()``
        """
        flow = self._wait(poll_interval=poll_interval, retry_budget=retry_budget)
        limited = within(flow, self._limit(timeout, "had not finished"))
        return _drive.run(limited, self._transport, sleep, on_event)

    def result(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], None] | None = None,
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
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the wait.
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
            ``score = run.result(timeout=3600)["score"]``
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
        outcome = _drive.run(limited, self._transport, sleep, on_event)
        return outcome.read_result()

    def is_held(self) -> bool:
        """Return whether the run's commands have failed and its container is held for a shell.

        Only of a run with ``debug_on_failure``, whose log is read. Raises the server errors.
        """
        flow = self._operations.is_held(self._snapshot)
        return _drive.run(flow, self._transport)

    def attach(
        self,
        ssh_identity_file: str | os.PathLike[str] | None = None,
        *,
        node: int = 0,
        timeout: float | None = None,
        poll_interval: float = 5.0,
    ) -> Self:
        """Wait until the run has started, log in to its container and forward its ports; return the run.

        Waits while the run is submitted, pending or provisioning (its image is pulled, or it is tried
        again). Then opens an SSH tunnel, without an ``ssh`` program and without touching its configuration:
        every port of the configuration's ``ports`` can be reached at 127.0.0.1 (see ``ports``), and
        ``logs()`` becomes live. A tunnel that breaks is opened again, for up to 10 minutes. A run that has
        already finished raises nothing: it is not attached (``is_attached``), and ``logs()`` reads from the
        server. An attached run is left as it is. As a context manager, the run calls ``detach()`` at the
        end, which never stops the run.

        The server hands out no host keys, so a machine's first key is accepted and only compared with
        itself when the tunnel is opened again. If the server has an SSH proxy, the proxy's key is compared
        with ``~/.ssh/known_hosts`` if that file has an entry for it.

        Args:
            ssh_identity_file: The path of the private key to log in with. Default: the key of the client, the
                user's key on the server or ``~/.dstack/ssh/id_rsa``, whichever the run was submitted with.
            node: The node of a run on several, counted from 0; of a service the first running replica.
            timeout: Seconds to wait for the start. None: no limit.
            poll_interval: Seconds between two status requests.

        Returns:
            The run.

        Raises:
            AttachError: The login failed; it names the hop, what failed and what to do.
            PortInUseError: A local port is taken.
            ConfigurationError: The key file cannot be used, or the run does not have that node.
            WaitTimeoutError: The run had not started within ``timeout``; it keeps running.
            ServerError: The server errors.

        Example::

            with run.attach():
                print(requests.get(f"http://localhost:{run.ports[8000]}").text)

        Source: the documented API, "attach()"; PROTOCOL 4.
        """
        if self._attachment is None:
            flow = self._operations.attach(
                self.name, self.id, identity_file=ssh_identity_file, node=node, poll_interval=poll_interval
            )
            limited = within(flow, self._limit(timeout, "had not started"))
            self._snapshot, self._attachment = _drive.run(limited, self._transport)
            # Also for a run that has finished and is not attached: ``logs()`` then reads everything.
            self._attach_asked = True
        return self

    def detach(self) -> None:
        """Close the SSH tunnel and the local ports; the run keeps running. Does nothing if not attached.

        Source: the documented API, "detach()".
        """
        attachment, self._attachment, self._attach_asked = self._attachment, None, False
        if attachment is not None:
            attachment.close()

    def __enter__(self) -> Self:
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.detach()

    def wait_until_ready(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], None] | None = None,
    ) -> str:
        """Wait until the service answers requests and return its address, ``service_url``.

        It answers once a reply comes from the service itself, whatever its HTTP status.

        Args:
            timeout: Seconds to wait, None for no limit.
            poll_interval: Seconds between two polls.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the wait.

        Returns:
            The address.

        Raises:
            RunError: The run ended before the service answered.
            WaitTimeoutError: ``timeout`` passed; the run keeps running.
            ConfigurationError: The run is not a service.
            ServerError: The server errors.

        Example:
            ``url = run.wait_until_ready(timeout=600)``

        Source: PROTOCOL 1.9.
        """
        flow = self._operations.wait_until_ready(
            self.name, self.id, poll_interval=poll_interval, retry_budget=retry_budget
        )
        limited = within(flow, self._limit(timeout, "was not ready"))
        return _drive.run(limited, self._transport, sleep)

    def events(self, limit: int | None = None) -> list[EventRecord]:
        """Return what the server recorded of the run and its jobs, oldest first.

        ``limit`` (int) is the number of newest records to return, None for all. Raises
        ``UnsupportedServerError`` on servers before 0.20.0, and the server errors. Source: PROTOCOL 1.9.
        """
        return _drive.run(self._operations.events(self.id, limit), self._transport)

    def metrics(
        self, node: int | None = None, replica: int | None = None, limit: int | None = None
    ) -> RunMetrics:
        """Return what the run used of its machines: CPU, memory, GPUs; empty until there are values.

        The server measures every ten seconds. It keeps the last hour of a running job, and of a job that has
        ended the last hour for seven days (servers before 0.19: for an hour).

        Args:
            node: Only jobs of that node, counted from 0. Default: all; each job is a request.
            replica: Only jobs of that replica, counted from 0. Default: all.
            limit: The number of newest values of each metric; None: all that the server keeps.

        Returns:
            The series, one ``Metric`` each (percent, bytes), with ``summary()`` and ``plot()``. A notebook
            shows a chart.

        Raises:
            RunNotFoundError: The run does not have that job.
            ServerError: The other server errors.

        Example:
            ``print(run.metrics().summary().gpu_mean)``

        Source: PROTOCOL 1.9.
        """
        flow = self._operations.metrics(self._snapshot, node=node, replica=replica, limit=limit)
        return _drive.run(flow, self._transport)

    def stop(
        self,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> StopResult:
        """Stop the run and return what is known of it; a run that has finished is left alone.

        The server stops by name, so a status request first makes sure that the name still belongs to this
        run. A busy server may accept a stop and drop it. So with ``until="stopping"`` or ``"ended"`` the stop
        is repeated, at most every 5 seconds, and ``wait``, ``follow`` and ``logs(follow=True)`` of the same
        client repeat it too.

        Args:
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None retries an unreachable
                server for the client's retry budget and waits for the end without a limit.
            sleep: A function of seconds, instead of ``time.sleep``.

        Returns:
            The result; its ``is_safe`` is true, because everything else is raised.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.

        Example:
            ``run.stop(until="ended", timeout=60)``

        Source: the documented API, "stop()"; PROTOCOL 1.7.
        """
        flow = self._operations.stop(self._target, abort, until, timeout, self._check)
        return _drive.run(flow, self._transport, sleep)
