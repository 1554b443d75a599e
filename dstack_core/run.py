"""A run, as the client sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from dstack_core import _drive
from dstack_core._base import RunBase
from dstack_core._flow.raw_log import ChunkOptions, LogChunk
from dstack_core._flow.retry import within
from dstack_core._transport.blocking import BlockingTransport
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import Event
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord, LogBytes, Metric
from dstack_core.models.statuses import RunStatus
from dstack_core.models.stops import StopResult


class Run(RunBase[BlockingTransport]):
    """A handle to one run, from ``client.runs``; its attributes are as of the last poll."""

    def status(self) -> RunStatus:
        """Ask the server for the run's status. Raises the server errors."""
        return self.refresh()._snapshot.status

    def refresh(self) -> Self:
        """Fetch the run. Raises ``RunNotFoundError`` when the run was deleted, and the server errors."""
        snapshot = _drive.run(self._operations.get(self.name, self.id), self._transport)
        if snapshot is None:
            raise RunNotFoundError(f"the run {self.name} is gone: {self.url}")
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
        """Yield the log as bytes: what there is now, with ``follow`` all until the run ends.

        After ``attach()`` all until the run ends: live from the container where the run has one job and
        nothing but ``follow`` is asked for, else what the server gets to know (seconds later). A connection
        that is cut on the way loses no byte and doubles none. ``start_time`` leaves out what is older (a
        naive one is in this machine's time zone). ``poll_interval`` in seconds. ``diagnose`` reads the log
        of the job's runner instead. ``node`` (int) reads one node of a task on several.

        Each ``LogBytes`` knows its node, replica and attempt. With one job, chunks are as the runner wrote
        them, live ones with their terminal escape sequences; with several they are whole lines, so that no
        line mixes two nodes. Lines end with ``\\r\\n``. All attempts of a retried job are read. Raises
        ``ConfigurationError`` for a node the run has not, and the server errors. Source: the documented
        API, "attach()"; PROTOCOL 1.8, 4.6.
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
    ) -> Generator[Event, None, Outcome]:
        """Yield the run's events until it is finished; return its ``Outcome``.

        ``progress`` (from any earlier event) goes on right behind that event. ``poll_interval`` and
        ``retry_budget`` in seconds; a server that is silent for longer raises ``ServerUnreachableError``,
        the run keeps running. ``timeout`` (seconds) bounds everything, requests included, and raises
        ``WaitTimeoutError``. ``sleep`` (a function of seconds) replaces ``time.sleep``. Leaving the iteration
        does not stop the run. The status is looked at every time, a log that stays silent less and less
        often, at most 15 seconds apart (a minute with a ``SharedAsyncClient``). Raises
        ``RunNotFoundError`` and the server errors.
        """
        flow = self._follow(
            progress,
            timeout=timeout,
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
            sleep=sleep,
        )
        return _drive.iterate(flow, self._transport, sleep or time.sleep)

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

        Args:
            timeout: Seconds to wait, None for no limit. Requests end with it, too.
            poll_interval: Seconds between two status requests.
            retry_budget: Seconds for which an unreachable server is retried.
            sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the wait.
            on_event: Gets the events, by default the ``dstack_core`` logger reports lost contact.

        Raises:
            WaitTimeoutError: The timeout passed; the run keeps running.
            ServerUnreachableError: The retry budget is spent; the run keeps running.
            ServerError: Any other refusal, such as ``RunNotFoundError``.
        """
        flow = self._follow(None, poll_interval=poll_interval, logs=False, retry_budget=retry_budget)
        limited = within(flow, self._limit(timeout, "had not finished"))
        return _drive.run(limited, self._transport, sleep, on_event)

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
        again), at most ``timeout`` seconds, looking every ``poll_interval`` seconds. Then opens an SSH
        tunnel, without an ``ssh`` program and without touching its configuration: every port of ``ports``
        can be reached at 127.0.0.1 (see ``ports``) and ``logs()`` becomes live. A tunnel that is cut is
        opened again, for up to 10 minutes. A run that is already over is no error: it just is not attached
        (``is_attached``), and ``logs()`` reads from the server. An attached run is left as it is.

        ``ssh_identity_file``: the private key to log in with; without it the key of the client, the user's
        key on the server or ``~/.dstack/ssh/id_rsa``, whichever the run was submitted with. ``node``: which
        node of a run on several; of a service the first running replica is taken. Use it as a context
        manager to ``detach()`` at the end, which never stops the run.

        The server hands out no host keys, so a machine's first key is accepted and only compared with
        itself when the tunnel is opened again. Where the server has an SSH proxy, the proxy's key is compared
        with ``~/.ssh/known_hosts`` when that knows the proxy.

        Raises ``AttachError`` that names the hop, what failed and what to do; ``PortInUseError`` for a
        local port that is taken; ``ConfigurationError`` for a key file or a node that is none;
        ``WaitTimeoutError``; the server errors. Source: the documented API, "attach()"; PROTOCOL 4.
        """
        if self._attachment is None:
            flow = self._operations.attach(
                self.name, self.id, identity_file=ssh_identity_file, node=node, poll_interval=poll_interval
            )
            limited = within(flow, self._limit(timeout, "had not started"))
            self._snapshot, self._attachment = _drive.run(limited, self._transport)
            self._attach_asked = True
        return self

    def detach(self) -> None:
        """Close the SSH tunnel and the local ports; the run keeps running. Does nothing when not attached.

        Source: the documented API, "detach()".
        """
        attachment, self._attachment, self._attach_asked = self._attachment, None, False
        if attachment is not None:
            attachment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

        It answers when a reply comes from the service itself, whatever its status. ``timeout``,
        ``poll_interval`` and ``retry_budget`` (how long a silent server is borne) in seconds; ``sleep`` as
        in ``follow``. Raises the ``RunError`` of a run that ends before,
        ``WaitTimeoutError`` (the run goes on), ``ConfigurationError`` for a run that is no service, and
        the server errors. Source: PROTOCOL 1.9.
        """
        flow = self._operations.wait_until_ready(
            self.name, self.id, poll_interval=poll_interval, retry_budget=retry_budget
        )
        limited = within(flow, self._limit(timeout, "was not ready"))
        return _drive.run(limited, self._transport, sleep)

    def events(self, limit: int | None = None) -> list[EventRecord]:
        """Return what the server recorded of the run and its jobs, oldest first.

        ``limit`` (int) asks for the newest so many, None for all. Raises ``UnsupportedServerError`` on
        servers before 0.20.0, and the server errors. Source: PROTOCOL 1.9.
        """
        return _drive.run(self._operations.events(self.id, limit), self._transport)

    def metrics(self, node: int = 0, replica: int = 0, limit: int | None = None) -> list[Metric]:
        """Return what one job used of its machine: CPU, memory, GPUs; empty until there are values.

        ``node`` and ``replica`` name the job, ``limit`` (int) asks for the newest so many values of each
        metric, None for all the server keeps. Raises ``RunNotFoundError`` for a job the run has not, and
        the server errors. Source: PROTOCOL 1.9.
        """
        flow = self._operations.metrics(self.name, self.id, node=node, replica=replica, limit=limit)
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
        run. A busy server may accept a stop and drop it: with ``until="stopping"`` or ``"ended"`` it is
        repeated, at most every 5 seconds, and ``wait``, ``follow`` and ``logs(follow=True)`` of the same
        client do that, too.

        Args:
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None retries an unreachable
                server for the client's retry budget and waits for the end without a limit.
            sleep: A function of seconds, instead of ``time.sleep``.

        Returns:
            The result; its ``is_safe`` is true, for anything else is raised.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not get as far as ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.

        Source: the documented API, "stop()"; PROTOCOL 1.7.
        """
        flow = self._operations.stop(self._target, abort, until, timeout, self._check)
        return _drive.run(flow, self._transport, sleep)
