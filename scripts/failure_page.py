"""The reference page of the failure categories, made from their table."""

from __future__ import annotations

from dstack_core.integration import FAILURE_CATEGORIES, RETRIED_CATEGORIES, FailureCategory, in_categories

NAME = "failure-categories"
TITLE = "Failure categories"
_INTRO = """\
`outcome.category` is why a run did not succeed: a stable name, the same for all dstack servers from 0.18.44
to 0.22.5, and empty for a success. `outcome.cause` and `outcome.next_step` are its sentences. More names
may be added: treat one that you do not know by its group, the part before the dot. A reason that only a
newer server has gives `unknown`, and `outcome.reason` keeps the server's word.

A category comes from the reason, the message, the exit status and the offers of the run's jobs. The server's
events are not read: those of a run and its jobs repeat the reason and the message, and add none (a contract
test reads both on a real server).

The kind decides the error that is raised. A category with a check mark is retried by default where a retry
policy or condition of this project is used: [How to find out why a run
failed](../how-to/find-out-why-a-run-failed.md) shows both."""

_ERRORS = (
    ("user", "RunUserError", "RunFailedError", "DstackUserError"),
    ("limit", "RunLimitError", "RunFailedError", "DstackLimitExceeded"),
    ("infrastructure", "RunInfrastructureError", "RunFailedError", "DstackInfrastructureError"),
    ("capacity", "NoCapacityError", "RunError", "DstackNoCapacity"),
    ("interruption", "RunInterruptedError", "NoCapacityError", "DstackSpotInterrupted"),
    ("stopped", "RunStoppedError", "RunError", "DstackRunStopped"),
    ("unknown", "RunFailedError", "RunError", "DstackRunFailed"),
)


def render() -> str:
    """Return the text of the page."""
    kinds = [f"| {kind} | `{core}` | `{base}` | `{airflow}` |" for kind, core, base, airflow in _ERRORS]
    return "\n".join(
        [
            f"# {TITLE}",
            "",
            _INTRO,
            "",
            "| kind | error | which is also a | in Airflow |",
            "|---|---|---|---|",
            *kinds,
            "",
            "| category | kind | retried | cause | what to do |",
            "|---|---|---|---|---|",
            *map(_row, FAILURE_CATEGORIES),
            "",
        ]
    )


def _row(row: FailureCategory) -> str:
    retried = "✓" if in_categories(row.name, RETRIED_CATEGORIES) else ""
    return f"| `{row.name}` | {row.kind} | {retried} | {row.cause} | {row.next_step} |"
