"""Stop a run whose task ends early: ask first, then read its last lines."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

import anyio

from prefect_dstack._connect import STOP_BUDGET, STOP_TIMEOUT, open_async_client, open_client
from prefect_dstack._relay import Relay
from prefect_dstack._steps import Ask, Pause, Steps, adrive, drive
from prefect_dstack._submit import Target
from prefect_dstack.credentials import DstackCredentials

# Prefect kills a cancelled process after 30 s: asking may take about 8 s, the last lines another 5 s.
DRAIN_SECONDS = 5.0
_ASYNC_SECONDS = 20.0
_DRAIN_INTERVAL = 0.5
_APPEAR_SECONDS = 4.0
_APPEAR_INTERVAL = 0.5


class _DrainOver(Exception):
    """Leave the wait for the last lines."""


def stop_steps(target: Target) -> Steps[Any | None]:
    """Ask the server to stop the target and return the run; None when there is none.

    A run of the same name with another marker is left alone. While a submission may still be at work
    its run is looked for a little longer. Source: PROTOCOL 1.4, 1.7.
    """
    attempt = target.attempt
    for _ in range(int(_APPEAR_SECONDS / _APPEAR_INTERVAL)):
        run = yield Ask(lambda client: client.runs.get(attempt.run_name))
        if run is not None and run.marker == attempt.marker:
            if not is_ending(run):
                yield Ask(lambda client: client.runs.stop(attempt.run_name))
            return run
        if not target.may_appear:
            return None
        yield Pause(_APPEAR_INTERVAL)
    return None


def is_ending(run: Any) -> bool:
    """Tell whether the run is over or was asked to stop, as of the last look."""
    from dstack_core import RunStatus

    return run.outcome() is not None or RunStatus(run.raw_status).is_stopping


def stop(credentials: DstackCredentials | None, target: Target, relay: Relay, logger: Any) -> None:
    """Stop the target and relay what it still says, within about 13 s; raises no error.

    A new client is used: the interrupted one may be in the middle of a reply.
    """
    try:
        with open_client(credentials, STOP_TIMEOUT, STOP_BUDGET) as client:
            run = drive(stop_steps(target), client, time.sleep)
            if run is not None:
                logger.info("Asked the server to stop run %s", run.name)
                _drain(run, relay)
    except Exception as error:
        _tell(logger, target, error)
    _sum_up(logger, relay)


async def astop(credentials: DstackCredentials | None, target: Target, relay: Relay, logger: Any) -> None:
    """Stop the target: the twin of ``stop``, shielded from the cancellation that led here."""
    with anyio.move_on_after(_ASYNC_SECONDS, shield=True):
        try:
            async with open_async_client(credentials, STOP_TIMEOUT, STOP_BUDGET) as client:
                run = await adrive(stop_steps(target), client, anyio.sleep)
                if run is not None:
                    logger.info("Asked the server to stop run %s", run.name)
                    await _adrain(run, relay)
        except Exception as error:
            _tell(logger, target, error)
        _sum_up(logger, relay)


def _drain(run: Any, relay: Relay) -> None:
    deadline = time.monotonic() + DRAIN_SECONDS

    def sleep(seconds: float) -> None:
        if time.monotonic() + seconds > deadline:
            raise _DrainOver
        time.sleep(seconds)

    try:
        for event in run.follow(
            relay.progress, poll_interval=_DRAIN_INTERVAL, retry_budget=DRAIN_SECONDS, sleep=sleep
        ):
            relay.handle(event)
    except _DrainOver:
        return


async def _adrain(run: Any, relay: Relay) -> None:
    with anyio.move_on_after(DRAIN_SECONDS):
        events = run.follow(
            relay.progress, poll_interval=_DRAIN_INTERVAL, retry_budget=DRAIN_SECONDS, sleep=anyio.sleep
        )
        async with aclosing(events):
            async for event in events:
                relay.handle(event)


def _tell(logger: Any, target: Target, error: Exception) -> None:
    name = target.attempt.run_name
    logger.error(
        "Run %s may go on until its max_duration, for stopping it failed: %s. Stop it with `dstack stop %s`",
        name,
        error,
        name,
    )


def _sum_up(logger: Any, relay: Relay) -> None:
    if relay.outcome is not None:
        logger.info("Run %s %s", relay.outcome.run_name, relay.outcome.message)
