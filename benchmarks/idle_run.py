"""What an idle run costs in an hour: the requests of the real client, on a clock that the benchmark advances."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.results import Curve, Row, Section, cli
from benchmarks.stub_server import Answers
from dstack_core._flow.follow import LONGEST_LOG_PAUSE, FollowOptions, follow
from dstack_core._flow.steps import Wait
from dstack_core._shared import batched_polls
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call, Reply
from dstack_core.models.progress import Progress

INTERVAL = 5.0
HOUR = 3600


def requests_of(seconds: float, *, shared: bool) -> Counter[str]:
    """Return the requests for following a run without output."""
    answers, now = Answers(1, 0, 100, 1), 0.0
    longest = batched_polls.LONGEST_LOG_PAUSE if shared else LONGEST_LOG_PAUSE
    options = FollowOptions(INTERVAL, logs=True, wall_clock=lambda: now, longest_log_pause=longest)
    flow = follow(Api("http://server", "main"), Progress("run-0", "id-0"), options)

    def done(call: Call[Any]) -> Any:
        asked = {"id": "id-0", "run_name": "run-0"}
        return call.parse(Reply(200, {}, answers.reply(call.request.path, asked)))

    step = next(flow)
    while now < seconds:
        if isinstance(step, Call):
            step = flow.send(done(step))
        elif isinstance(step, Wait):
            for _ in range(step.polls):
                now += step.interval
                run = done(step.poll)
            step = flow.send(run)
        else:
            step = next(flow)
    return answers.counts


def measure(quick: bool) -> Section:
    """Count; ``quick`` makes no difference."""
    looks = HOUR / INTERVAL
    section = Section("An idle run")
    for name, shared, part in (("alone", False, 1.0), ("one of 100 watched together", True, 0.01)):
        counted = requests_of(HOUR, shared=shared)
        ours = counted["runs/get"] * part + counted["logs/poll"]
        section.rows.append(
            Row(
                f"requests of an idle run per hour, {name}",
                f"{ours:.0f} ({counted['runs/get'] * part:.0f} for the status, {counted['logs/poll']} for the log)",
                f"status and log at every poll: {2 * looks:.0f}",
                f"1/{2 * looks / ours:.1f}",
            )
        )
    minutes = [0.5, 1, 2, 3, 5, 10, 20, 30, 45, 60]
    series = {
        name: [(minute, float(requests_of(minute * 60, shared=True)["logs/poll"])) for minute in minutes]
        for name in ("a log without new lines",)
    }
    series["a read at each poll"] = [(minute, minute * 60 / INTERVAL) for minute in minutes]
    section.curves.append(
        Curve(
            "idle-log-reads.png",
            "Log reads of a run without output",
            "minutes without output",
            "reads",
            series,
        )
    )
    section.notes.append(
        f"Poll interval {INTERVAL:g} s. Every poll reads the status. A log without new lines is read at every "
        "second, then every fourth, then every twelfth poll, at most a minute apart (15 s if a run is followed alone), "
        'and at once when the status changes. A log that flows is read at each poll, or at every second one where many runs are followed together (see "Chatty runs").'
    )
    return section


if __name__ == "__main__":
    cli(measure)
