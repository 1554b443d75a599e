"""The files of a call while it is submitted, and what the function returned or raised once its run has ended.

Prefect stores the exception and the value of a task, so the secrets of the run are masked in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_core import Configuration, Event, ReportLimits
    from dstack_core.integration import FunctionCall
    from prefect_dstack._job import Job

Mask = Callable[[str], str]


class FunctionResult:
    """The call of one run, and what the run has reported of it; ``call`` was packed."""

    def __init__(self, call: FunctionCall) -> None:
        self.call = call
        self._found: list[tuple[int, Mapping[str, Any]]] = []

    @property
    def limits(self) -> ReportLimits:
        """The limits on what the run reports, which have room for the result."""
        from dstack_core import ReportLimits

        return ReportLimits(max_bytes=self.call.report_bytes)

    @contextmanager
    def files(self, marker: str, base: Configuration) -> Iterator[Configuration]:
        """Write the files of the call and provide the configuration that has them, during the block."""
        from dstack_core.integration import report_key

        key = report_key(marker)
        with TemporaryDirectory(prefix="dstack-function-") as temporary:
            folder = Path(temporary) / "function"
            self.call.write(folder, key)
            yield self.call.configuration(folder, key, base)

    def take(self, event: Event) -> None:
        """Remember what a run has reported of the function; other events are ignored."""
        from dstack_core import Reported

        if isinstance(event, Reported) and event.kind == "function":
            self._found.append((event.attempt, event.payload))

    def report(self, marker: str) -> Mapping[str, Any] | None:
        """Return what the run with this marker reported of the function, None without."""
        from dstack_core.integration import choose_report, report_key

        return choose_report(self._found, report_key(marker))

    def pauses(self, job: Job) -> tuple[float, ...]:
        """Return the seconds before each further read of the log, which may be late; none if all is there."""
        from dstack_core.integration import late_read_pauses

        outcome = job.relay.outcome
        if outcome is None or self.report(job.attempt.ref.marker) is not None:
            return ()
        return late_read_pauses(outcome)

    def value(self, job: Job) -> Any:
        """Return what the function returned; raise what it raised, or why its run failed."""
        from dstack_core import (
            FunctionSkipped,
            NoResultError,
            RemoteFunctionError,
            RunError,
            UnusableFunctionError,
        )
        from dstack_core.integration import RESULT_WARNING, mask_value

        report, outcome, mask = self.report(job.attempt.ref.marker), job.relay.outcome, job.relay.masker.mask
        if report is None or outcome is None:
            # Raises the error of a run that failed.
            job.result()
            assert outcome is not None  # noqa: S101 - the line before raises without one
            raise NoResultError(
                f"{self.call.name}: run {outcome.run_name} succeeded, but its log holds no result. "
                f"See {outcome.url}",
                outcome,
            )
        try:
            value = self.call.read(_without_secrets(report, mask), outcome)
        except (RemoteFunctionError, UnusableFunctionError):
            raise
        except FunctionSkipped:
            # As ``run_task``, which ends in no state of its own either.
            value = None
        except RunError:
            # The same error, with the last lines of the log.
            job.result()
            raise
        # Logs the end, and that a skipped run was skipped.
        job.result()
        shown = mask_value(value, mask)
        if shown is not value:
            job.logger.warning("%s", RESULT_WARNING.format(what=self.call.name))
        return shown


def _without_secrets(report: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    """Return the payload with the texts masked that an error shows; the value may be a pickle."""
    from dstack_core.integration import mask_value

    shown = ("message", "reason", "traceback")
    return {name: mask_value(value, mask) if name in shown else value for name, value in report.items()}
