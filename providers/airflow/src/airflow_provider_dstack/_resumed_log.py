"""The log of a task that resumes: what its trigger left of it, and on request what its trigger relayed.

The problem: Airflow shows the lines of a trigger while the task is deferred. Once the task has ended, its
reader has the folder of the API server, or else the remote store, and the log of the worker; no triggerer is
asked any more (Airflow 3.1 to 3.3). Where triggerers share neither with the API server, their lines vanish.
With a remote store a triggerer uploads its lines when the trigger ends, so those of a triggerer that was
killed are missing too.

The idea: the worker's log is kept everywhere. With ``relay_log_again`` the trigger's event holds where the
trigger began, so the resumed task relays the log from there. Nothing else has to be saved: Airflow makes a
trigger again from the same arguments.

Invariants: what a triggerer has done already is not done again. The first pass, from the trigger's position
on, makes calls and receives messages and logs no line; the second one, from the beginning of the deferral,
logs lines and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_provider_dstack._parameters import report_limits
from airflow_provider_dstack._remaining_log import RemainingLog, relay_remaining_log
from airflow_provider_dstack._run_reports import RunReports

if TYPE_CHECKING:
    from airflow_provider_dstack.operators import DstackRunOperator
    from dstack_core import Outcome
    from dstack_core.integration import CallbackNotifier


class FinishedLog(NamedTuple):
    """What a whole log showed: the last lines, the outcome, and whether all of it was read.

    ``relayed`` is the state of the relay with which the log of a next step continues.
    """

    tail: Sequence[str]
    outcome: Outcome
    is_whole: bool
    is_tail_shown: bool
    relayed: Mapping[str, Any]


def finish_log(
    operator: DstackRunOperator,
    event: Mapping[str, Any],
    outcome: Outcome,
    reports: RunReports,
    secrets: Sequence[str],
    notifier: CallbackNotifier,
    is_killed: Callable[[], bool],
) -> FinishedLog:
    """Relay what is missing of the log of a run that has ended; return the last lines and the outcome.

    Raises ``DstackRunInterrupted`` when the task is ended meanwhile.
    """
    # An event of an earlier version does not count the bytes.
    relayed = {"tail": event["tail"], **(event.get("relayed") or {})}
    finished = FinishedLog(event["tail"], outcome, True, bool(event.get("is_tail_shown")), relayed)
    again = event.get("again")
    if event.get("rest"):
        relay = _relay_of(operator, event, secrets, is_killed, outcome.run_name, outcome.url)
        rest = relay(event, outcome, reports, notifier=notifier, is_shown=not again)
        # What could not be read is not counted.
        relayed = {key: event["rest"][key] for key in ("relayed_bytes", "left_out_bytes")} | {
            "tail": rest.tail
        }
        finished = FinishedLog(
            rest.tail, rest.outcome or outcome, rest.is_whole, rest.is_tail_shown, rest.relayed or relayed
        )
    if again:
        shown = _relay_again(operator, event, secrets, is_killed, finished.outcome)
        finished = finished._replace(tail=shown.tail, is_tail_shown=shown.is_tail_shown)
    return finished


def relay_what_was_shown(
    operator: DstackRunOperator, event: Mapping[str, Any], is_killed: Callable[[], bool]
) -> None:
    """Relay the log that there is of a run that has not ended, if the event holds where its trigger began.

    An error is logged: the task fails in any case, by what ended its deferral.
    """
    if event.get("again"):
        _relay_again(operator, event, list(operator.secret_texts()), is_killed, None)


def _relay_again(
    operator: DstackRunOperator,
    event: Mapping[str, Any],
    secrets: Sequence[str],
    is_killed: Callable[[], bool],
    outcome: Outcome | None,
) -> RemainingLog:
    operator.log.info("Relaying again what the triggerer has relayed (relay_log_again).")
    again = event["again"]
    name = again["progress"]["run_name"]
    relay = _relay_of(operator, event, secrets, is_killed, name, None if outcome is None else outcome.url)
    # Its lines about links and the like belong to the log; its values were received already.
    shown_only = RunReports(again["reported"])
    return relay({"rest": again, "tail": again["tail"]}, outcome, shown_only)


def _relay_of(
    operator: DstackRunOperator,
    event: Mapping[str, Any],
    secrets: Sequence[str],
    is_killed: Callable[[], bool],
    run_name: str,
    url: str | None,
) -> Callable[..., RemainingLog]:
    from dstack_core.integration import StepSums, collect_secrets

    return partial(
        relay_remaining_log,
        run_name=run_name,
        url=url,
        hook=operator.hook(),
        secrets=secrets,
        collect=partial(collect_secrets, mask_env=operator.mask_env, secret_names=operator.secret_names()),
        log_budget_bytes=operator.log_budget_bytes,
        log_timestamps=operator.log_timestamps,
        retry_budget=operator.retry_budget,
        limits=report_limits(operator.max_report_bytes, operator.max_reports_per_second),
        log=operator.log,
        is_killed=is_killed,
        earlier_attempts=StepSums.from_dict(event.get("steps")).count,
    )
