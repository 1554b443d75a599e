"""How long a reported message takes from the run to a follower, on a real dstack server.

Two followers read the same run at the same time: the shipped one, which reads a run that reports twice an
interval, and one that reads it once an interval.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import dstack_core as dstack
from benchmarks.results import Row, Section, cli
from dstack_core._flow import follow
from tests.rig.server import RealServer

INTERVAL = 5.0
A_SECOND = 100
_SCRIPT = """
import time
start = time.time()
for step in range({count}):
    time.sleep(max(0, start + step / {rate} - time.time()))
    print('::dstack::{{"kind":"metric","step":%d,"sent":%.3f}}' % (step, time.time()), flush=True)
"""


def delays(name: str, share: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Follow a run and return its steps and the seconds from each message to its event."""
    follow._REPORTING_SHARE = share
    steps: list[int] = []
    seconds: list[float] = []
    with dstack.Client(**arguments) as client:
        run = client.runs.get(name)
        for event in run.follow(poll_interval=INTERVAL) if run else ():
            if isinstance(event, dstack.Reported):
                steps.append(int(event.payload["step"]))
                seconds.append(time.time() - event.payload["sent"])
    return {"once": steps == list(range(len(steps))), "count": len(steps), "seconds": seconds}


def measure(quick: bool) -> Section:
    """Measure a minute of messages, or 20 seconds with ``quick``."""
    count = (20 if quick else 60) * A_SECOND
    section = Section("Delay of a reported message")
    with RealServer(images=True) as server:
        arguments: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        script = _SCRIPT.format(count=count, rate=A_SECOND)
        task = {"type": "task", "commands": [f"python3 -c '{_quoted(script)}'"], "user": "root"}
        with dstack.Client(**arguments) as client:
            run = client.runs.submit({**task, "fleets": [server.fleet]}, "report-delay")
            found = [json.loads(each.communicate()[0]) for each in _followers(run.name, arguments)]
    ours, whole = ([*statistics.quantiles(one["seconds"], n=20)] for one in found)
    if not all(one["once"] and one["count"] == count for one in found):
        raise RuntimeError(
            f"expected {count} messages, each once and in order, got {[one['count'] for one in found]}"
        )
    for name, index in (("p50", 9), ("p95", 18)):
        section.rows.append(
            Row(
                f"delay of a message, {name}, {A_SECOND} a second",
                f"{ours[index]:.2f} s",
                f"one read a poll interval of {INTERVAL:g} s: {whole[index]:.2f} s",
                f"{ours[index] / whole[index]:.0%}",
                "p95 within the poll interval",
                ours[18] <= INTERVAL,
            )
        )
    section.notes.append(
        f"{count:,} messages of one run on dstack 0.22.5, followed by two processes at the same time; each got "
        "each message once and in order. The server itself fetches the log of a machine every 2.8 s."
    )
    return section


def _quoted(script: str) -> str:
    return script.replace("'", "'\\''")


def _followers(name: str, arguments: dict[str, Any]) -> list[subprocess.Popen[str]]:
    options = [json.dumps([name, share, arguments]) for share in (follow._REPORTING_SHARE, 1.0)]
    code = (
        "import json, sys; from benchmarks.report_delay import delays; "
        "print(json.dumps(delays(*json.load(sys.stdin))))"
    )
    started = []
    for each in options:
        # The token goes through the standard input: arguments are seen in the list of processes.
        reader, writer = os.pipe()
        with os.fdopen(writer, "w") as options_file, os.fdopen(reader) as stdin:
            started.append(
                subprocess.Popen([sys.executable, "-c", code], stdin=stdin, stdout=subprocess.PIPE, text=True)
            )
            options_file.write(each)
    return started


if __name__ == "__main__":
    cli(measure)
