"""An executor that runs each task as KubernetesExecutor does in a pod: the same command, in processes of its own.

A container is a session here: its first process gets what a kubelet sends, and all of its processes are killed
together. The command is that of the installed provider.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.executors.base_executor import BaseExecutor
from airflow.providers.cncf.kubernetes.pod_generator import workload_to_command_args

# The directory with one file for each container: the id of its first process.
PODS = "POD_EXECUTOR_DIRECTORY"


class PodExecutor(BaseExecutor):
    """An executor with a process for each task, which reports as the watcher of pods does."""

    is_production = False

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._containers: dict[Any, subprocess.Popen[bytes]] = {}

    def _process_workloads(self, workload_items: Sequence[Any]) -> None:
        for workload in workload_items:
            key = workload.ti.key
            self.queued_tasks.pop(key, None)
            program, *arguments = workload_to_command_args(workload)
            assert program == "python"
            directory = Path(os.environ[PODS])
            name = f"{key.run_id}.{key.try_number}"
            with (directory / f"{name}.out").open("ab") as output:
                container = subprocess.Popen(
                    [sys.executable, *arguments],
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env={**os.environ, "AIRFLOW__CORE__EXECUTOR": "LocalExecutor"},
                )
            (directory / name).write_text(str(container.pid))
            self._containers[key] = container
            self.running.add(key)

    def sync(self) -> None:
        """Report the containers that have ended."""
        for key, container in list(self._containers.items()):
            status = container.poll()
            if status is not None:
                del self._containers[key]
                (self.success if status == 0 else self.fail)(key)

    def end(self) -> None:
        """Leave the containers running, as pods are."""

    def terminate(self) -> None:
        """Leave the containers running, as pods are."""
