"""Run the task that ``train.dstack.yml`` describes, the very file that ``dstack apply`` takes.

The server comes from the environment or ``~/.dstack/config.yml``.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from dstack_core import OutcomeDict
from prefect_dstack import arun_task, stop_dstack_runs

CONFIGURATION = Path(__file__).with_name("train.dstack.yml")

# Stops what the flow leaves running when it is cancelled or its process dies.
stop_runs = stop_dstack_runs()


@flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
async def example_dstack_yaml() -> OutcomeDict:
    """Train as the file describes, on spot instances if there are any, and return the outcome."""
    return await arun_task(CONFIGURATION, spot_policy="auto", poll_interval=2.0)


if __name__ == "__main__":
    import asyncio

    asyncio.run(example_dstack_yaml())
