"""The errors of a function that was called in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core.models.debug import hold_note
from dstack_core.models.outcome import Outcome, RunError, RunFailedError

# The type that a run reports whose requirements could not be installed; another try may succeed.
REQUIREMENTS_ERROR = "RequirementsError"


class RemoteFunctionError(RunFailedError):
    """An exception that the function raised in its run.

    Attributes:
        type_name: The exception's class, with its module unless it is built in (str).
        text: The exception's message (str).
        traceback: The end of its traceback, at most 20 lines of 500 characters (list of str).
        outcome: How the run ended.
    """

    def __init__(
        self, message: str, outcome: Outcome, *, type_name: str, text: str, traceback: list[str]
    ) -> None:
        super().__init__(message, outcome)
        self.type_name = type_name
        self.text = text
        self.traceback = traceback

    @classmethod
    def of(cls, name: str, payload: Mapping[str, Any], outcome: Outcome) -> RemoteFunctionError:
        """Return the error that the run of the function ``name`` reported."""
        lines = [str(line) for line in payload.get("traceback") or ()]
        shown = "".join(f"\n  {line}" for line in lines)
        what = f"{name} raised an exception in run {outcome.run_name}"
        if payload.get("type") == REQUIREMENTS_ERROR:
            what = (
                f"{name} was not called in run {outcome.run_name}, since its requirements could not be "
                "installed. Correct requirements, or try again if the index was out of reach"
            )
        return cls(
            f"{what}:{shown}{hold_note(outcome.debug_command)}",
            outcome,
            type_name=str(payload.get("type") or ""),
            text=str(payload.get("message") or ""),
            traceback=lines,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the attributes when the error is pickled, such as for another process."""
        return _remote_error, (self.message, self.outcome, self.type_name, self.text, self.traceback)


class UnusableFunctionError(RunFailedError):
    """A call that cannot work as it is, however often it is tried: a value that cannot travel, no Python."""


class FunctionSkipped(RunError):
    """A function that ended with ``dstack_report.skip(reason)``: there is nothing to do, and no result.

    Attributes:
        reason: The reason that it gave (str).
        outcome: How the run ended, which is a success.
    """

    def __init__(self, name: str, reason: str, outcome: Outcome) -> None:
        super().__init__(
            f"{name} skipped itself in run {outcome.run_name}: {reason or 'no reason given'}", outcome
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the attributes when the error is pickled, such as for another process."""
        return FunctionSkipped, (self.name, self.reason, self.outcome)


def _remote_error(
    message: str, outcome: Outcome, type_name: str, text: str, traceback: list[str]
) -> RemoteFunctionError:
    return RemoteFunctionError(message, outcome, type_name=type_name, text=text, traceback=traceback)
