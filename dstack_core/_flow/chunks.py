"""Read a run's raw log bytes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from dstack_core._flow.logs import PageReader
from dstack_core._flow.steps import Flow, Sleep, call
from dstack_core._wire.api import Api
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import Event
from dstack_core.models.progress import LogCursor, Progress


@dataclass(frozen=True, slots=True)
class LogChunk(Event):
    """Carry bytes of the log as the runner wrote them."""

    data: bytes


def read_chunks(
    api: Api, progress: Progress, since: datetime | None, follow: bool, poll_interval: float
) -> Flow[None]:
    """Report every chunk logged from ``since`` on; with ``follow`` until the run is finished."""
    begin = LogCursor(after=since.astimezone(UTC).isoformat(timespec="microseconds") if since else None)
    while True:
        run = yield from call(api.get_run(progress.run_name, progress.run_id))
        if run is None:
            raise RunNotFoundError(f"the run {progress.run_name} is no longer in project {api.project}")
        for job in run.jobs:
            for submission in job.submissions:
                if not submission.may_have_logs:
                    continue
                pages = PageReader(api, run.name, submission.id, progress.cursors.get(submission.id, begin))
                while (messages := (yield from pages.next_page())) is not None:
                    progress = progress.with_cursor(submission.id, pages.cursor)
                    yield LogChunk(progress, b"".join(message.data for message in messages))
        if not (follow and run.is_active):
            return
        yield Sleep(poll_interval)
