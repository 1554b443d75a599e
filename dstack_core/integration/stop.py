"""The stop of a run that belongs to a task, with a log of what is known.

The problem: a task is stopped in its last seconds. Its process may be killed at any moment, the server may be
unreachable, and a GPU that keeps running costs money, so the log has to name what the user must check.

The idea: the first line is logged before any request and names the run and its page, so that also the log of
a process that is killed a moment later has them. The last line has the result: ended, stopping, or why the
stop could not be confirmed.

Invariants: the last line is written in any case; an interrupt, such as a second Ctrl-C, reaches the flow as
``GeneratorExit`` when its driver closes it. Nothing is logged below WARNING unless the stop succeeded.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dstack_core._flow.stop_options import Check, StopOptions, StopTarget, Until
from dstack_core.integration.names import RunRef
from dstack_core.integration.outcome_text import describe_stop, may_keep_running
from dstack_core.models.options import check_choice, check_seconds
from dstack_core.models.stops import StopResult

if TYPE_CHECKING:
    from dstack_core._flow.steps import Flow
    from dstack_core._operations import Operations
    from dstack_core.aio import AsyncClient
    from dstack_core.client import Client


class Logger(Protocol):
    """The part of a logger that is used here; a task's own logger has it."""

    def log(self, level: int, msg: str, /, *args: Any) -> Any:
        """Log a message with its arguments."""


def stop_run(
    client: Client,
    ref: RunRef,
    *,
    timeout: float,
    log: Logger,
    run_id: str | None = None,
    submitted: bool = False,
    may_appear: bool = False,
    abort: bool = False,
    until: Literal["stopping", "ended"] = "stopping",
    reason: str | None = None,
    backstop: str | None = None,
    on_accepted: Callable[[StopResult], None] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> StopResult:
    """Stop the run that ``ref`` names, and no other; log what happens and return what is known of it.

    Args:
        client: The client of the run's project; its own time limits apply within ``timeout``.
        ref: The run. With ``ref.generated`` the stop is the first request.
        timeout: Time limit of the whole stop in seconds, requests included.
        log: Gets a line before the first request, and one with the result.
        run_id: The run's id, None if it is not known.
        submitted: Whether this task submitted the run or saw it active as its own. Then a check of a name
            that the user chose does not prevent the stop if it gets no reply.
        may_appear: Whether a submission may still be under way; then a missing run is searched for until the
            time limit.
        abort: Kill the processes without a grace period.
        until: Return once the server shows the run stopping, or its end.
        reason: Why the run is stopped, for the first line, such as ``"the flow run was cancelled"``.
        backstop: A sentence on what else stops the run, for the last line if the stop was not confirmed.
        on_accepted: Called once, as soon as the server has accepted a stop and the run's id is known; never
            for a stop that was refused, nor for a run that was stopping already. It must not block or raise.
        sleep: A function of seconds, instead of ``time.sleep``.

    Returns:
        The result. Server errors are not raised: ``result.is_safe`` is false and ``result.error`` is the
        reason.

    Raises:
        ConfigurationError: ``timeout`` or ``until`` is wrong.

    Example:
        ``result = stop_run(client, attempt.ref, timeout=30, log=logger, submitted=True)``

    Source: PROTOCOL 1.4, 1.7.
    """
    from dstack_core import _drive

    options = _options(client, ref, timeout, submitted, may_appear, abort, until)
    target, lines = StopTarget(ref.name, ref.marker, run_id), _Lines(log, reason, backstop)
    flow = _logged(client._operations, target, options, lines, on_accepted)
    return _drive.run(flow, client._transport, sleep)


async def astop_run(
    client: AsyncClient,
    ref: RunRef,
    *,
    timeout: float,
    log: Logger,
    run_id: str | None = None,
    submitted: bool = False,
    may_appear: bool = False,
    abort: bool = False,
    until: Literal["stopping", "ended"] = "stopping",
    reason: str | None = None,
    backstop: str | None = None,
    on_accepted: Callable[[StopResult], None] | None = None,
    sleep: Callable[[float], Awaitable[None]] | None = None,
) -> StopResult:
    """Stop the run that ``ref`` names, and no other: the twin of ``stop_run``, which has the details.

    Args:
        client: The client of the run's project; its own time limits apply within ``timeout``.
        ref: The run. With ``ref.generated`` the stop is the first request.
        timeout: Time limit of the whole stop in seconds, requests included.
        log: Gets a line before the first request, and one with the result.
        run_id: The run's id, None if it is not known.
        submitted: Whether this task submitted the run or saw it active as its own.
        may_appear: Whether a submission may still be under way.
        abort: Kill the processes without a grace period.
        until: Return once the server shows the run stopping, or its end.
        reason: Why the run is stopped, for the first line.
        backstop: A sentence on what else stops the run, for the last line if the stop was not confirmed.
        on_accepted: Called once, when the server has accepted a stop. It must not block or raise.
        sleep: An async function of seconds, instead of ``asyncio.sleep``.

    Returns:
        The result. Server errors are not raised: ``result.is_safe`` is false and ``result.error`` is the
        reason.

    Raises:
        ConfigurationError: ``timeout`` or ``until`` is wrong.
    """
    from dstack_core import _adrive

    options = _options(client, ref, timeout, submitted, may_appear, abort, until)
    target, lines = StopTarget(ref.name, ref.marker, run_id), _Lines(log, reason, backstop)
    flow = _logged(client._operations, target, options, lines, on_accepted)
    return await _adrive.arun(flow, client._transport, sleep)


def _options(
    client: Client | AsyncClient,
    ref: RunRef,
    timeout: float,
    submitted: bool,
    may_appear: bool,
    abort: bool,
    until: str,
) -> StopOptions:
    check_seconds("timeout", timeout, above=True)
    check_choice("until", until, ("stopping", "ended"))
    # No other run can have a generated name, so no check delays the stop.
    check = Check.NEVER if ref.generated else Check.IF_ANSWERED if submitted else Check.ALWAYS
    return StopOptions(client._operations.clock, abort, timeout, check, Until(until), may_appear=may_appear)


@dataclass(frozen=True, slots=True)
class _Lines:
    """The logger of a stop, and what the caller adds to its lines."""

    log: Logger
    reason: str | None
    backstop: str | None


def _logged(
    operations: Operations,
    target: StopTarget,
    options: StopOptions,
    lines: _Lines,
    on_accepted: Callable[[StopResult], None] | None,
) -> Flow[StopResult]:
    """Stop the run between the two lines of the log."""
    log, name = lines.log, target.name
    page = operations.api.runs_url() if target.run_id is None else operations.api.run_url(target.run_id)
    accepted: StopResult | None = None

    def note(result: StopResult) -> None:
        nonlocal accepted
        accepted = result
        if on_accepted is not None:
            on_accepted(result)

    try:
        why = "" if lines.reason is None else f" ({lines.reason})"
        log.log(logging.WARNING, "Stopping run %s%s: %s", name, why, page)
        result = yield from operations.stop_owned(target, replace(options, on_accepted=note))
    except BaseException:
        # Also GeneratorExit: an interrupted stop must not end without a line.
        if accepted is None:
            text = f"The stop of run {name} was interrupted. {may_keep_running(lines.backstop)}: {page}"
        else:
            text = (
                f"The stop of run {name} was interrupted after the server had accepted it; the run's end was "
                f"not seen: {accepted.url}"
            )
        log.log(logging.ERROR, "%s", text)
        raise
    level = logging.INFO if result.is_safe else logging.ERROR
    log.log(level, "%s", describe_stop(result, backstop=lines.backstop))
    return result
