"""What the lines of a hundred deferred runs cost: requests a minute while each writes one every few seconds.

Run it with the Python of an Airflow environment: the triggers are real ones.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.results import Row, Section, Table, cli
from benchmarks.stub_server import Stub
from benchmarks.watching import INTERVAL, SETTLED_SECONDS, window

RUNS = 100
LINE_SECONDS = 4.0
# The first read of each log comes in the first round, and the followers spread over the rounds behind it.
CHATTY_WARM_SECONDS = 30.0
# A window begins and ends between two rounds, so it may contain one more than its length shows.
TOLERANCE = 1.1


@dataclass(frozen=True, slots=True)
class Cost:
    """The requests a minute of one way, the seconds from a line to its read, and the share of a core."""

    way: str
    polls: float
    log_reads: float
    line_delay: float | None
    cores: float

    def line(self) -> list[str]:
        """Return a line of the table."""
        delay = "" if self.line_delay is None else f"{self.line_delay:.1f}"
        return [self.way, f"{self.polls:,.0f}", f"{self.log_reads:,.0f}", delay, f"{self.cores:.1%}"]


def watch(way: str, line_seconds: float, warm: float, seconds: float, *more: str) -> Cost:
    """Watch the runs with triggers in one process; ``line_seconds`` of 0: they write nothing."""
    with Stub(runs=RUNS, line_seconds=line_seconds) as stub:
        measured, asked = window(stub, "triggers", RUNS, warm, seconds, *more)
    minutes = measured["seconds"] / 60
    lines = asked["bench/lines"]
    return Cost(
        way,
        (asked["runs/get"] + asked["runs/list"]) / minutes,
        asked["logs/poll"] / minutes,
        asked["bench/line_milliseconds"] / lines / 1000 if lines else None,
        measured["cpu_seconds"] / measured["seconds"],
    )


def measure(quick: bool) -> Section:
    """Measure quiet runs, and chatty ones with and without the rule for many, all at the same time."""
    seconds = 30.0 if quick else 120.0
    quiet_warm = CHATTY_WARM_SECONDS if quick else SETTLED_SECONDS
    with ThreadPoolExecutor() as pool:
        ways = [
            pool.submit(watch, "quiet", 0, quiet_warm, seconds),
            pool.submit(
                watch,
                "chatty, read at every poll",
                LINE_SECONDS,
                CHATTY_WARM_SECONDS,
                seconds,
                "--every-poll",
            ),
            pool.submit(
                watch, "chatty, read at every second poll", LINE_SECONDS, CHATTY_WARM_SECONDS, seconds
            ),
        ]
        quiet, every, ours = (way.result() for way in ways)
    section = Section("Chatty runs")
    section.rows += [
        Row(
            f"log reads a minute, {RUNS} deferred runs with a line every {LINE_SECONDS:g} s",
            f"{ours.log_reads:,.0f}",
            f"a read at every poll: {every.log_reads:,.0f}; runs without output: {quiet.log_reads:,.0f}",
            f"1/{every.log_reads / ours.log_reads:.1f}",
            "half of a read at every poll",
            ours.log_reads <= every.log_reads / 2 * TOLERANCE,
        ),
        Row(
            f"status requests a minute, {RUNS} deferred runs with a line every {LINE_SECONDS:g} s",
            f"{ours.polls:,.0f}",
            f"runs without output: {quiet.polls:,.0f}",
            target="as for runs without output",
            reached=ours.polls <= quiet.polls * TOLERANCE + 1,
        ),
    ]
    head = ["runs", "status reads/min", "log reads/min", "seconds from a line to its read, mean", "core"]
    section.tables.append(
        Table(
            f"{RUNS} runs in one process, poll interval {INTERVAL:g} s",
            head,
            [quiet.line(), every.line(), ours.line()],
        )
    )
    section.notes.append(
        f"Each chatty run writes a line every {LINE_SECONDS:g} s. `DstackRunTrigger` watches all runs of a way in one "
        "process, as a triggerer does; the logs of the quiet runs are read at the lowest rate by then. Of more than "
        "50 runs in a process, a log that flows is read at every second poll. `read at every poll` is the same "
        "without this rule, as fewer runs are read. Status polls share pages of 100 runs; a log has no page that many "
        "runs share, so while logs flow, most requests are log reads."
    )
    return section


if __name__ == "__main__":
    cli(measure)
