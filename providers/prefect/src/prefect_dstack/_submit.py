"""Submit a task's run, or find the one that an earlier execution submitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prefect_dstack._names import Attempt, Identity
from prefect_dstack._steps import Ask, Pause, Steps

if TYPE_CHECKING:
    from dstack_core import ServerUnreachableError

_STOPPING_PAUSE = 2.0
_LONGEST_PAUSE = 10.0


@dataclass(slots=True)
class Target:
    """Say which run is meant, at any moment, so that an interrupted task knows what to stop.

    ``is_chosen`` tells that the attempt is settled, ``is_adopted`` that an earlier execution submitted
    it; ``may_appear`` that a submission is under way whose run the server may not show yet.
    """

    identity: Identity
    attempt: Attempt
    is_chosen: bool = False
    is_adopted: bool = False
    may_appear: bool = False

    @classmethod
    def of(cls, identity: Identity) -> Target:
        """Return the target that starts with the first attempt."""
        return cls(identity, identity.attempt(1))


def acquire(
    target: Target,
    spec: Mapping[str, Any],
    retry_budget: float,
    logger: Any,
    clock: Callable[[], float] = time.monotonic,
) -> Steps[Any]:
    """Return the run of this task; ``spec`` are the arguments of ``submit``.

    An active or successful run of an earlier execution of the same flow run is taken as it is, any
    other one is followed by a new attempt. The server's silence is borne for ``retry_budget`` seconds,
    in calls so short that a cancellation is seen between them; then raises ``ServerUnreachableError``.
    """
    from dstack_core import ServerUnreachableError

    started, pause = clock(), 1.0
    while True:
        try:
            if not target.is_chosen:
                yield from _choose(target)
                started = clock()
            target.may_appear = True
            run = yield Ask(lambda client: _submit(client, target.attempt, spec))
        except ServerUnreachableError as error:
            fault = _fault(error)
            left = retry_budget - (clock() - started)
            if left <= 0:
                raise ServerUnreachableError(
                    f"{fault}. No answer for {clock() - started:.0f} s (retry_budget "
                    f"{retry_budget:.0f} s); {_what_is_left(target)}"
                ) from None
            logger.warning("%s; trying again for %.0f s", fault, left)
            yield Pause(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)
        else:
            target.may_appear = False
            return run


def find(
    name: str, retry_budget: float, logger: Any, clock: Callable[[], float] = time.monotonic
) -> Steps[Any | None]:
    """Return the run of that name, or None; the server's silence is borne as in ``acquire``."""
    from dstack_core import ServerUnreachableError

    started, pause = clock(), 1.0
    while True:
        try:
            return (yield Ask(lambda client: client.runs.get(name)))
        except ServerUnreachableError as error:
            left = retry_budget - (clock() - started)
            if left <= 0:
                raise
            logger.warning("%s; trying again for %.0f s", _fault(error), left)
            yield Pause(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)


def _choose(target: Target) -> Steps[None]:
    """Settle on an attempt before anything is submitted.

    Afterwards even a run that failed at once is known to be this execution's own, and not repeated.
    """
    identity = target.identity
    while not target.is_chosen:
        found = yield Ask(lambda client: client.runs.get(target.attempt.run_name))
        number = identity.number_of(found.marker) if found is not None else None
        if number is None:
            target.is_chosen = True
            return
        target.attempt = identity.attempt(number)
        status = yield Ask(partial(_status, found))
        outcome = found.outcome()
        if outcome is None:
            target.is_chosen = target.is_adopted = not status.is_stopping
            if status.is_stopping:
                yield Pause(_STOPPING_PAUSE)
        elif outcome.succeeded:
            target.is_chosen = target.is_adopted = True
        else:
            target.attempt = identity.attempt(number + 1)
            target.is_chosen = identity.fixed_name is not None


def _status(run: Any, _: Any) -> Any:
    return run.status()


def _submit(client: Any, attempt: Attempt, spec: Mapping[str, Any]) -> Any:
    # A worker never attaches: whether a local port of its machine is free does not matter.
    return client.runs.submit(**spec, run_name=attempt.run_name, marker=attempt.marker, verify_ports=False)


def _fault(error: ServerUnreachableError) -> str:
    """Return what went wrong, without the budget of the one short call."""
    from dstack_core import DstackError

    cause = error.__cause__
    return cause.message if isinstance(cause, DstackError) else error.message


def _what_is_left(target: Target) -> str:
    if not target.may_appear:
        return "nothing was submitted"
    name = target.attempt.run_name
    return f"run {name} may have been submitted: look with `dstack ps`, stop it with `dstack stop {name}`"
