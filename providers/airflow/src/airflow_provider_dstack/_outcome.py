"""How a run, or following it, ended: as a trigger's event, as a task's result, as a provider's error."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_dstack._compat import AirflowSkipException
from airflow_provider_dstack.errors import (
    AirflowFailException,
    DstackCostLimitReached,
    DstackError,
    DstackInfrastructureError,
    DstackLimitExceeded,
    DstackNoCapacity,
    DstackNoFleet,
    DstackRunError,
    DstackRunFailed,
    DstackRunInterrupted,
    DstackRunStopped,
    DstackServerUnreachable,
    DstackSpotInterrupted,
    DstackUserError,
)

if TYPE_CHECKING:
    from airflow_provider_dstack._parameters import Returns
    from dstack_core import Outcome

FINISHED = "finished"
TIMED_OUT = "timed_out"
BROKEN = "broken"
# What creates a fleet within a DAG, in the advice of core.
FLEET_OPTION = "DstackFleetOperator or dstack_fleet"

# The classes of ``dstack_core`` that a run's end raises, by name: a DAG file does not import them.
_KINDS: dict[str, type[DstackRunError]] = {
    "NoCapacityError": DstackNoCapacity,
    "NoFleetError": DstackNoFleet,
    "RunInfrastructureError": DstackInfrastructureError,
    "RunInterruptedError": DstackSpotInterrupted,
    "RunLimitError": DstackLimitExceeded,
    "RunStoppedError": DstackRunStopped,
    "RunUserError": DstackUserError,
}

# What is kept in Airflow's database has a bound, whatever a server sends. An error of ``dstack_core`` is some
# hundreds of characters.
_TEXT_CHARACTERS = 2000


class Payload(dict[str, Any]):
    """The payload of an event, without the run's log and result in its repr.

    A triggerer logs the repr of each event, where the last lines would be once more, and unfolded.
    """

    def __repr__(self) -> str:
        outcome = self.get("outcome") or {}
        return f"{self.get('kind')}: run {outcome.get('run_name')} {outcome.get('status')}"


def finished_event(
    outcome: Outcome,
    tail: Sequence[str],
    rest: Mapping[str, Any] | None = None,
    reported: Mapping[str, Any] | None = None,
    since: Mapping[str, float] | None = None,
    *,
    is_tail_shown: bool = False,
    relayed: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the JSON-plain payload for a run that has ended, with the last log lines that were relayed.

    ``rest`` is the position where the worker continues the log; None if all of it was relayed. ``reported``
    is the state of ``RunReports``, which a ``rest`` contains already, and ``since`` is when each status was
    seen first, likewise. ``is_tail_shown``: the task's log has the last lines. ``relayed`` counts the bytes
    of the log, for a next step.
    """
    from dstack_core.integration import outcome_dict

    event = Payload(
        kind=FINISHED, outcome=outcome_dict(outcome), tail=list(tail), is_tail_shown=is_tail_shown
    )
    if rest is not None:
        event["rest"] = dict(rest)
    else:
        event["reported"], event["since"] = dict(reported or {}), dict(since or {})
        if relayed:
            event["relayed"] = dict(relayed)
    return event


def timed_out_event(stopped: bool) -> dict[str, Any]:
    """Return the payload for a passed ``execution_timeout``; ``stopped``: nothing is left to stop."""
    return {"kind": TIMED_OUT, "stopped": stopped}


def broken_event(error: Exception) -> dict[str, Any]:
    """Return the payload for a run that can no longer be followed."""
    known = as_airflow_error(error, submitted=True)
    return {"kind": BROKEN, "error": type(known).__name__, "message": _short(str(known))}


def broken_error(event: Mapping[str, Any]) -> Exception:
    """Return the exception that ``broken_event`` made a payload of."""
    known = (AirflowFailException, DstackServerUnreachable, DstackRunInterrupted)
    kind = next((one for one in known if one.__name__ == event.get("error")), DstackError)
    return kind(str(event.get("message")))


def result_of(
    outcome: Outcome,
    tail: Sequence[str],
    skip_on: Collection[int] = (),
    *,
    is_tail_shown: bool = False,
    retry_option: str | None = "run_retry_policy",
) -> dict[str, Any]:
    """Return the task's result; raise the matching error, with the last log lines, for a run that failed.

    Raises ``AirflowSkipException`` for an exit status that is in ``skip_on``. ``is_tail_shown``: the task's
    log has those lines, so the error's message does not repeat them. ``retry_option`` is the parameter of the
    operator that makes a run wait for capacity.
    """
    from dstack_core import RunError
    from dstack_core.integration import outcome_dict, raise_for_outcome

    if outcome.exit_status is not None and outcome.exit_status in skip_on:
        raise AirflowSkipException(
            f"Run {outcome.run_name} exited with status {outcome.exit_status}, which means to skip the task."
        )
    try:
        raise_for_outcome(
            outcome,
            tail,
            retry_option=retry_option,
            fleet_option=FLEET_OPTION,
            are_shown=is_tail_shown,
        )
    except RunError as error:
        kind = _KINDS.get(type(error).__name__, DstackRunFailed)
        if outcome.category == "limit.max_cost":
            kind = DstackCostLimitReached
        raise kind(error.message, {**outcome_dict(outcome)}, tail) from None
    return {**outcome_dict(outcome)}


def what_task_returns(
    outcome: Outcome,
    result: dict[str, Any],
    *,
    returns: Returns,
    skip: str | None,
    reports: bool,
) -> Any:
    """Return the value of a task whose run succeeded: ``result`` (its outcome), or what the run reported.

    ``skip`` is the reason that the run gave to skip the task, which raises ``AirflowSkipException``.
    ``reports`` is the parameter of the operator. Raises ``DstackError`` for a run without a result.
    """
    if skip is not None:
        raise AirflowSkipException(f"Run {outcome.run_name} asks to skip the task: {skip}")
    if returns == "outcome":
        return result
    if not outcome.has_result:
        how = "Write" if reports else "Set reports=True, and write"
        raise DstackError(
            f"returns: expected a result of run {outcome.run_name}, which succeeded, got none. {how} JSON to "
            f"$DSTACK_RESULT_FILE or call dstack_report.result(). See {outcome.url}"
        )
    return outcome.result


def raise_as_airflow_error(error: BaseException, *, submitted: bool) -> NoReturn:
    """Raise ``error`` as ``as_airflow_error`` returns it.

    Airflow logs an error with its causes, so one with the same text is not made a cause.
    """
    from dstack_core import DstackError as CoreError

    known = as_airflow_error(error, submitted=submitted)
    if known is error:
        raise known
    raise known from (None if isinstance(error, CoreError) else error)


def as_airflow_error(error: BaseException, *, submitted: bool) -> Exception:
    """Return ``error`` as an error of this provider; where no retry can help, ``AirflowFailException``.

    ``submitted`` is whether the server had already taken the run: then it has shown that it is a dstack
    server, and a malformed reply is worth a retry.
    """
    from airflow_provider_dstack._parameters import in_words_of_operator
    from dstack_core import (
        AccessDeniedError,
        AuthenticationError,
        ConfigurationError,
        ProjectNotFoundError,
        ProtocolError,
        RequestRejectedError,
        RunNameTakenError,
        RunNotFoundError,
        ServerUnreachableError,
        UnsupportedServerError,
    )
    from dstack_core import DstackError as CoreError

    if not isinstance(error, CoreError):
        return error if isinstance(error, Exception) else DstackError(repr(error))
    hopeless: tuple[type[Exception], ...] = (
        ConfigurationError,
        AuthenticationError,
        AccessDeniedError,
        ProjectNotFoundError,
    )
    if not submitted:
        hopeless += (RequestRejectedError, UnsupportedServerError, ProtocolError)
    if isinstance(error, AuthenticationError):
        return AirflowFailException(f"{error.message} Here it is the password of the Airflow connection.")
    if isinstance(error, hopeless) and not isinstance(error, RunNameTakenError):
        return AirflowFailException(in_words_of_operator(error.message))
    if isinstance(error, ServerUnreachableError):
        return DstackServerUnreachable(error.message)
    if isinstance(error, RunNotFoundError):
        return DstackRunInterrupted(error.message)
    return DstackError(error.message)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]} [...]"
