"""Flows that other processes run: ``python -m tests.provider_prefect.served_flows serve`` or a flow's name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow, serve
from prefect.runtime import flow_run

from dstack_core import RunFailedError
from prefect_dstack import (
    arun_task,
    run_task,
    stop_dstack_runs,
    stop_runs_on_cancellation,
    stop_runs_on_crash,
)

LONG = {"type": "task", "commands": ["echo started; sleep 900"]}
FAST: dict[str, Any] = {"poll_interval": 0.5}


def tell_process() -> None:
    """Write this process's id where the test finds it."""
    directory = os.environ.get("TEST_PIDS")
    if directory:
        (Path(directory) / str(flow_run.get_id())).write_text(str(os.getpid()))


@flow
def direct() -> None:
    """Call the sync task."""
    tell_process()
    run_task(LONG, **FAST)


@flow
def submitted() -> None:
    """Submit the sync task to a thread."""
    run_task.submit(LONG, **FAST).result()


@flow
def mapped() -> None:
    """Map the sync task over three configurations."""
    run_task.map([LONG] * 3, **FAST).result()


@flow
async def adirect() -> None:
    """Await the async task."""
    await arun_task(LONG, **FAST)


@flow
async def agathered() -> None:
    """Await two async tasks at once."""
    await asyncio.gather(arun_task(LONG, **FAST), arun_task(LONG, **FAST))


@flow
def asubmitted() -> None:
    """Submit the async task to a thread."""
    arun_task.submit(LONG, **FAST).result()


@flow
async def sync_in_async() -> None:
    """Call the sync task in an async flow."""
    run_task(LONG, **FAST)


@flow
def child() -> None:
    """Submit the sync task, as a subflow."""
    run_task.submit(LONG, **FAST).result()


@flow(on_cancellation=[stop_runs_on_cancellation])
def parent() -> None:
    """Run a subflow."""
    child()


@flow(on_crashed=[stop_dstack_runs()])
def hooked() -> None:
    """Submit the sync task; the process is killed and the hook stops the run."""
    tell_process()
    run_task.submit(LONG, **FAST).result()


@flow(on_crashed=[stop_runs_on_crash])
def kept() -> None:
    """Call a task whose run outlives the killed process; the run ends when there is a file called go."""
    tell_process()
    wait = f"while [ ! -e {os.environ.get('TEST_PIDS')}/go ]; do sleep 0.2; done"
    commands = ["echo started", wait, "echo the-end"]
    journal = "tests.callback_journal.Journal"
    run_task({"type": "task", "commands": commands}, on_crash="keep", callbacks=journal, **FAST)


@flow(on_cancellation=[stop_runs_on_cancellation])
def stubborn() -> None:
    """Start a run that ignores the signals of a stop, so that its end takes the server's whole grace period."""
    run_task({"type": "task", "name": "train", "commands": ["trap '' INT TERM; sleep 900"]}, **FAST)


@flow(on_crashed=[stop_runs_on_crash])
def held() -> None:
    """Call a task whose first run fails, once there is a file called fail, and is held; its second succeeds."""
    tell_process()
    folder = os.environ.get("TEST_PIDS")
    commands = [
        f"echo $$ >> {folder}/shells",
        f"until [ -e {folder}/fail ]; do sleep 0.1; done",
        f"[ -e {folder}/again ] || {{ touch {folder}/again; exit 3; }}",
    ]
    run_task({"type": "task", "commands": commands}, debug_on_failure=45, **FAST)


@flow(on_cancellation=[stop_runs_on_cancellation])
def working_while_held() -> None:
    """Call a task whose run fails and is held, and continue."""
    with contextlib.suppress(RunFailedError):
        run_task({"type": "task", "commands": ["exit 3"]}, debug_on_failure="10m", **FAST)
    tell_process()
    time.sleep(900)


FLOWS: list[Any] = [
    direct, submitted, mapped, adirect, agathered, asubmitted, sync_in_async, parent, hooked, kept,
    stubborn, held, working_while_held,
]  # fmt: skip


def main() -> None:
    """Serve all flows, or run one."""
    # A shell that started the tests in the background may have left SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = sys.argv[1]
    if name == "serve":
        serve(*(item.to_deployment(item.__name__) for item in FLOWS), limit=20)
        return
    chosen = next(item for item in FLOWS if item.__name__ == name)
    if asyncio.iscoroutinefunction(chosen.fn):
        asyncio.run(chosen())
    else:
        chosen()


if __name__ == "__main__":
    main()
