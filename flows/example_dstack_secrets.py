"""Give a run a secret of Prefect's without its value standing in the run's environment.

The server comes from the environment or ``~/.dstack/config.yml``. The block ``hf-token`` becomes a secret of
the dstack project for the time of the ``with``, and the run gets a reference to it.
"""

from __future__ import annotations

from prefect import flow
from prefect.blocks.system import Secret
from pydantic import SecretStr

from dstack_core import OutcomeDict, Task
from prefect_dstack import run_task, stop_dstack_runs, sync_secrets

# Deletes the secret, too, when the flow run is cancelled or its process dies.
stop_runs = stop_dstack_runs()

DOWNLOAD = Task(commands=["echo downloading with a token of ${#HF_TOKEN} characters"])


@flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
def example_dstack_secrets() -> OutcomeDict:
    """Run a task with the secret, and return its outcome."""
    with sync_secrets({"HF_TOKEN": Secret.load("hf-token")}) as env:
        return run_task(DOWNLOAD, env=env, max_duration="1h", poll_interval=2.0)


if __name__ == "__main__":
    Secret(value=SecretStr("hf_example")).save("hf-token", overwrite=True)
    example_dstack_secrets()
