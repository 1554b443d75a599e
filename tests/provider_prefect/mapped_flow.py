"""A flow that maps ``run_task``: ``python -m tests.provider_prefect.mapped_flow COUNT FILE`` prints its id."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow, runtime
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_dstack import run_task

_RUNNER: Any = ThreadPoolTaskRunner(max_workers=50)


@flow(task_runner=_RUNNER)
def mapped(count: int, file: str) -> list[str]:
    """Start so many runs, each of which ends once the file exists."""
    print(runtime.flow_run.id, flush=True)  # noqa: T201
    commands = f"while [ ! -e {file} ]; do sleep 0.1; done"
    tasks: list[dict[str, Any]] = [
        {
            "type": "task",
            "name": f"part-{number}",
            "commands": [f"echo before-{number}", commands, f"echo after-{number}"],
        }
        for number in range(count)
    ]
    return [future.result()["status"] for future in run_task.map(tasks, poll_interval=0.5)]


if __name__ == "__main__":
    mapped(int(sys.argv[1]), sys.argv[2])
