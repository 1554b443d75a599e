"""The end of a run, in the sentences and numbers that every engine shows.

The problem: the same end is shown in a log, in an error, in a state's message, in a table and as data, by
several hosts. Written in each of them, the texts drift apart, and a new field is forgotten in one of them.

The idea: ``OUTCOME_FIELDS`` lists the fields once, with their label and how each is shown; the sentences and
the table are made here, and a host only decides where they go. Tests compare the list with ``Outcome``, with
what Airflow and Prefect show, and with the table of the documentation.

What was chosen, and why: money has two decimals, below 1 USD up to four, and the unit behind it ("24.60 USD",
"0.0012 USD per hour"), since two dollar signs make a formula in some Markdown, and a price may be below a
cent. A duration has its units ("1 h 2 min 5 s"), since "1:02" is read as minutes or as hours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dstack_core.integration.utilization_text import describe_utilization
from dstack_core.models.durations import format_duration
from dstack_core.models.money import format_price, format_usd
from dstack_core.models.no_fleet import FROM_CODE, NO_FLEET, fleet_advice
from dstack_core.models.outcome import Outcome, RunError
from dstack_core.models.run_attempt import describe_attempts
from dstack_core.models.statuses import in_words
from dstack_core.models.stops import StopResult, StopState

if TYPE_CHECKING:
    from dstack_core.models.outcome_dict import OutcomeDict

# Most characters of a text in an outcome that an engine keeps in its database, whatever a server sends: an
# outcome stays below 25 kB. Much less would cut the hints of a run that found no machine.
LONGEST_TEXT = 2000
# The last log lines in an error: a screen of a UI, and about 10 kB at most.
LAST_LINES = 20
LONGEST_LINE = 500
_NO_MACHINE = "failed_to_start_due_to_no_capacity"
# What a table shows of a result and of metrics: a line or two of a UI. The data has all of it.
_RESULT_CHARACTERS = 200
_METRICS_SHOWN = 10


_TEXTS = ("str", "str | None")
# These come from a table of this package, in this or a newer version; its longest sentence is half of that.
_OF_CATEGORY = ("category", "cause", "next_step")
_LONGEST_OF_CATEGORY = 300


@dataclass(frozen=True, slots=True)
class OutcomeField:
    """A field of ``Outcome`` and how it is shown.

    Attributes:
        name: The field's name.
        type: Its type, as ``Outcome`` declares it.
        label: What a table calls it; empty for a field that tables leave out.
        meaning: Its description in the documentation.
        show: A function that turns a value into text for a person.
    """

    name: str
    type: str
    label: str
    meaning: str
    show: Callable[[Any], str] = str


def _short_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _RESULT_CHARACTERS else f"{text[:_RESULT_CHARACTERS]} [...]"


def _metrics_text(metrics: Mapping[str, float]) -> str:
    shown = [f"{name} {value:.6g}" for name, value in list(metrics.items())[:_METRICS_SHOWN]]
    return ", ".join(shown) + (" [...]" if len(metrics) > _METRICS_SHOWN else "")


def _touch(path: str) -> str:
    return f"touch {path}" if path else ""


def _nonzero(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: show(value) if value else ""


OUTCOME_FIELDS = (
    OutcomeField("run_name", "str", "Run", "the run's name"),
    OutcomeField("run_id", "str", "Run ID", "the server's ID of the run"),
    OutcomeField("project", "str", "Project", "the project it ran in"),
    OutcomeField("status", "RunStatus", "Status", "`done`, `failed`, `terminated` or `aborted`"),
    OutcomeField("exit_status", "int | None", "Exit status", "what the command exited with"),
    OutcomeField("reason", "str | None", "Reason", "why it ended, the server's word"),
    OutcomeField("message", "str", "Message", "why it ended, for a person"),
    OutcomeField("cost", "float", "Cost", "what it cost (USD)", format_usd),
    OutcomeField(
        "duration", "float | None", "Duration", "from the submission to the end (seconds)", format_duration
    ),
    OutcomeField("instance", "str | None", "Instance", "the type of its machine"),
    OutcomeField("backend", "str | None", "Backend", "the cloud or fleet of its machine"),
    OutcomeField("region", "str | None", "Region", "the region of its machine"),
    OutcomeField(
        "price_per_hour", "float | None", "Price", "the price of its machine (USD per hour)", format_price
    ),
    OutcomeField("url", "str", "Page", "the run's page on the server"),
    OutcomeField("result", "Any", "Result", "what it reported as its result", _short_json),
    OutcomeField(
        "metrics",
        "Mapping[str, float]",
        "Metrics",
        "the last value of each metric it reported",
        _metrics_text,
    ),
    OutcomeField("has_result", "bool", "", "whether it reported a result"),
    OutcomeField(
        "debug_seconds",
        "float",
        "Held",
        "how long its container was held after its commands had failed; at most, while it is held (seconds)",
        _nonzero(format_duration),
    ),
    OutcomeField(
        "debug_cost",
        "float",
        "Cost of the hold",
        "what that costs (USD), part of `cost`",
        _nonzero(format_usd),
    ),
    OutcomeField("debug_command", "str", "Shell", "the command that opens a shell in it while it is held"),
    OutcomeField("debug_done", "str", "Ends the hold", "the file whose creation in it ends the hold", _touch),
    OutcomeField(
        "utilization",
        "Utilization | None",
        "Utilization",
        "how busy its GPUs, CPUs and memory were",
        describe_utilization,
    ),
    OutcomeField("category", "str", "Category", "why it did not succeed, a stable name; empty for a success"),
    OutcomeField("cause", "str", "Cause", "what the category means"),
    OutcomeField("next_step", "str", "Next step", "what to do about it"),
    OutcomeField(
        "attempts",
        "Sequence[RunAttempt]",
        "Attempts",
        "its attempts that had a machine: number, reason, machine, cost and more of each",
        describe_attempts,
    ),
)
"""All fields of ``Outcome``, in its order."""
# A table begins with these: how it ended, why, and what to do.
_FIRST_ROWS = (
    *("run_name", "run_id", "project", "status", "exit_status", "reason", "message"),
    *("category", "cause", "next_step", "debug_command", "debug_done"),
)
# While a run is held, these are upper limits.
_OF_A_HOLD = ("Held", "Cost of the hold")


def outcome_dict(outcome: Outcome) -> OutcomeDict:
    """Return an outcome as an engine keeps it: values that JSON has, a few kilobytes beside the result.

    ``Outcome.from_dict`` reads it back; a text of more than 2000 characters is cut, a result is not.
    """
    return _bounded(outcome).to_dict()


def outcome_rows(outcome: Outcome) -> dict[str, str]:
    """Return what a table shows of an outcome, by label; fields without a value are left out.

    Why it failed and what to do about it comes before what it cost and where it ran.
    """
    short = _bounded(outcome)
    fields = [field for field in OUTCOME_FIELDS if field.label]
    fields.sort(key=lambda field: _FIRST_ROWS.index(field.name) if field.name in _FIRST_ROWS else 99)
    values = ((field, getattr(short, field.name)) for field in fields)
    shown = {field.label: field.show(value) for field, value in values if value not in (None, "", {})}
    if short.debug_command:
        shown.update({label: f"at most {shown[label]}" for label in _OF_A_HOLD if shown.get(label)})
    return {label: text for label, text in shown.items() if text}


def outcome_table(outcome: Outcome) -> str:
    """Return an outcome as a Markdown table; its header is the run's name, which links to the run's page."""
    # Both are in the header, which a user interface shows even if it is empty.
    rows = {name: text for name, text in outcome_rows(outcome).items() if name not in ("Run", "Page")}
    header = [f"| Run | [{outcome.run_name}]({outcome.url}) |", "|---|---|"]
    return "\n".join([*header, *(f"| {label} | {_cell(text)} |" for label, text in rows.items())])


def describe_outcome(outcome: Outcome) -> str:
    """Return the line that ends a run's log: how it ended, how long it took, where, and what it cost."""
    short = _bounded(outcome)
    # The error of the run follows this line, and has what the server reports about its search.
    found_none = in_words(short.reason) if short.reason == _NO_MACHINE else None
    place = ", ".join(part for part in (short.backend, short.region) if part)
    machine = f" on {short.instance}" if short.instance else ""
    took = "" if short.duration is None else format_duration(short.duration)
    where = f"{machine}{f' ({place})' if place and machine else ''}"
    parts = [
        f"Run {short.run_name} {found_none or short.message}",
        f"{took}{where}".strip(),
        format_usd(short.cost),
    ]
    return ", ".join(part for part in parts if part)


def describe_end(outcome: Outcome) -> str:
    """Return one sentence on how a run ended."""
    return f"Run {outcome.run_name} {_cut(outcome.message).rstrip('.')}."


def describe_failure(
    outcome: Outcome,
    last_lines: Sequence[str] = (),
    *,
    retry_option: str | None = None,
    fleet_option: str = FROM_CODE,
) -> str:
    """Return what a person needs to know of a run that did not succeed.

    Args:
        outcome: How the run ended.
        last_lines: The last lines of its log, with secrets hidden; at most 20 of them are shown, each cut
            at 500 characters.
        retry_option: The engine's name of the option that makes a run wait for capacity, such as
            ``"retry_policy"``; None if it has no such option.
        fleet_option: The engine's name of what creates a fleet, such as ``"dstack_fleet"``.

    Returns:
        The end, the run's page, what may help with the failure category, and the last lines.

    Example:
        ``raise TaskFailed(describe_failure(outcome, relay.tail, retry_option="retry_policy"))``
    """
    parts = [f"{describe_end(outcome)} See {outcome.url}", *_advice(outcome, retry_option, fleet_option)]
    if outcome.debug_command:
        parts.append(describe_hold(outcome))
        last_lines = [line for line in last_lines if not _is_of_hold(line, outcome)]
    lines = "".join(f"\n  {line[:LONGEST_LINE]}" for line in list(last_lines)[-LAST_LINES:])
    if lines:
        parts.append(f"The last log lines:{lines}")
    # Prefect logs a state with a backslash and n in place of a line end. Without the space that would be a
    # part of the link to the page.
    return "\n".join([f"{parts[0]} " if len(parts) > 1 else parts[0], *parts[1:]])


def _is_of_hold(line: str, outcome: Outcome) -> bool:
    # The run itself writes these lines at its end; the sentence above has them.
    return any(
        part in line for part in ("The container is held for", outcome.debug_command, outcome.debug_done)
    )


def describe_hold(outcome: Outcome) -> str:
    """Return how to get into the container of a failed run while it is held, and how to end that.

    Args:
        outcome: The outcome of a run that is held: it has a ``debug_command``.

    Example:
        ``if outcome.debug_command: logger.warning(describe_hold(outcome))``
    """
    cost = f", for at most {format_usd(outcome.debug_cost)}" if outcome.debug_cost else ""
    return (
        f"Its container is held for {format_duration(outcome.debug_seconds)}{cost}. "
        f"To open a shell in it: {outcome.debug_command}\n"
        f"To end it earlier, stop the run, or in the container: touch {outcome.debug_done}"
    )


# What the run itself can do about an end, by its reason. An engine that has the one option has both.
_WITHIN_A_TRY = {
    "failed_to_start_due_to_no_capacity": "set {retry_option} to let the run itself wait for one",
    "interrupted_by_no_capacity": (
        'set survive, such as "4h": another attempt then begins within the same try'
    ),
}


def _advice(outcome: Outcome, retry_option: str | None, fleet_option: str) -> Iterator[str]:
    # The cause is left out: the sentence on the end has it.
    if not outcome.category:
        return
    if outcome.category == NO_FLEET:
        # No wait helps here, so no retry is advised.
        yield f"{fleet_advice(fleet_option)} ({outcome.category})."
        return
    step = outcome.next_step.rstrip(".")
    if retry_option is not None and outcome.reason in _WITHIN_A_TRY:
        step = f"{step}; or {_WITHIN_A_TRY[outcome.reason].format(retry_option=retry_option)}"
    yield f"{step} ({outcome.category})."


def raise_for_outcome(
    outcome: Outcome,
    last_lines: Sequence[str] = (),
    *,
    retry_option: str | None = None,
    fleet_option: str = FROM_CODE,
    are_shown: bool = False,
) -> None:
    """Raise the error of a run that did not succeed, with ``describe_failure`` as its message.

    Args:
        outcome: How the run ended.
        last_lines: The last lines of its log, with secrets hidden; the error has them as ``last_lines``.
        retry_option: The engine's name of the option that makes a run wait for capacity, or None.
        fleet_option: The engine's name of what creates a fleet, as for ``describe_failure``.
        are_shown: Whether the log in which the error will be has those lines (``LogRelay.shows_tail``); then
            its message does not repeat them.

    Raises:
        RunStoppedError, NoCapacityError, RunFailedError: As ``Outcome.raise_for_status`` does.

    Example:
        ``raise_for_outcome(outcome, relay.tail)``
    """
    try:
        outcome.raise_for_status()
    except RunError as error:
        shown = () if are_shown else last_lines
        text = describe_failure(outcome, shown, retry_option=retry_option, fleet_option=fleet_option)
        raise type(error)(text, _bounded(outcome), last_lines) from None


def describe_status(run_name: str, status: str, message: str | None = None) -> str:
    """Return the line for a status that a run has reached.

    Args:
        run_name: The run's name.
        status: The status.
        message: The server's detail on it, or None.
    """
    return f"Run {run_name}: {status}" + (f" ({message})" if message else "")


def describe_stop(result: StopResult, *, backstop: str | None = None) -> str:
    """Return what is known after a stop, for a person, with the run's page where something is left to do.

    Args:
        result: What ``stop_run`` returned.
        backstop: A sentence on what else stops a run whose stop was not confirmed, such as a reaper; or None.
    """
    name = result.run_name
    match result.state:
        case StopState.ENDED if result.outcome is not None:
            return describe_end(result.outcome)
        case StopState.ENDED:
            return f"Run {name} has ended."
        case StopState.STOPPING:
            return f"Run {name} is stopping."
        case StopState.ACCEPTED:
            return f"The server accepted the stop of run {name}."
        case StopState.MISSING:
            return f"There is no run {name} to stop."
        case StopState.OTHER_OWNER:
            return f"Run {name} belongs to another owner now; it was left alone: {result.url}"
        case StopState.REFUSED:
            return (
                f"The server refused to stop run {name}: {_sentence(result.error)} "
                f"The run keeps running, until its max_duration if it has one: {result.url}"
            )
        case _:
            return (
                f"Could not confirm that run {name} is stopping: {_sentence(result.error)} "
                f"{may_keep_running(backstop)}: {result.url}"
            )


def may_keep_running(backstop: str | None) -> str:
    """Return what to expect of a run whose stop was not confirmed; the caller appends the run's page."""
    also = "" if backstop is None else f"{_sentence(backstop)} "
    return (
        f"It may keep running, until its max_duration if it has one. {also}Check it and stop it on its page"
    )


def _bounded(outcome: Outcome) -> Outcome:
    texts = ((field.name, getattr(outcome, field.name)) for field in OUTCOME_FIELDS if field.type in _TEXTS)
    changes: dict[str, Any] = {
        name: _cut(text, _LONGEST_OF_CATEGORY if name in _OF_CATEGORY else LONGEST_TEXT)
        for name, text in texts
        if text is not None
    }
    return replace(outcome, **changes)


def _cut(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else f"{text[:longest]} [...]"


def _cell(text: str) -> str:
    # A line break or a bar would end the cell of a Markdown table.
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str | None) -> str:
    return f"{(text or 'no reply').rstrip('.')}."
