"""The reaper in a real Airflow: what a lost worker left is found and stopped, and nothing else."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import client_of, json_in, over, wait_for
from tests.provider_airflow.test_real_components import running_run

pytestmark = [pytest.mark.slow, pytest.mark.matrix]


def lose_worker(components: Components, dag_id: str, dag_run: str) -> None:
    """Kill a task's process and its supervisor, as a machine that goes down does."""
    task = psutil.Process(components.task(dag_id, dag_run)["pid"])
    supervisor = task.parent()
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    task.kill()


def is_going(run: Run) -> bool:
    return run.refresh().raw_status == "running"


def test_what_a_lost_worker_left_is_stopped_and_nothing_else(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    lost_run = components.trigger("last_try", command="sleep 600")
    lost = running_run(shared_server, "last_try", lost_run)
    kept_run = components.trigger("sync_keep", command="sleep 600")
    kept = running_run(shared_server, "sync_keep", kept_run)
    going_run = components.trigger("sync", command=f"until [ -e {gate} ]; do sleep 0.1; done")
    going = running_run(shared_server, "sync", going_run)
    service_run = components.trigger("service", command="python3 -m http.server 8418 --bind 127.0.0.1")
    components.wait_for_state("service", service_run, "success")
    service = running_run(shared_server, "service", service_run)
    lost_marker = lost.marker or ""
    with client_of(shared_server) as client:
        # One run with the marker of another Airflow that has the same DAG, and one without a marker.
        others = client.runs.submit(
            {"type": "task", "commands": ["sleep 600"]},
            run_name="others",
            marker=lost_marker[:-6] + ("000000" if lost_marker[-6:] != "000000" else "111111"),
        )
        mine = client.runs.submit({"type": "task", "commands": ["sleep 600"]}, run_name="mine")
    for run in (others, mine):
        wait_for(f"running run {run.name}", partial(is_going, run))
    components.set_state("sync_keep", kept_run, "failed")
    lose_worker(components, "last_try", lost_run)
    components.wait_for_state("last_try", lost_run, "failed", seconds=180)
    components.wait_for_state("sync_keep", kept_run, "failed")
    assert is_going(lost)

    shown = components.command("dstack", "reap", "--dry-run", "--min-age", "0", "--output", "json")
    assert shown.returncode == 0, shown.stderr
    actions = {found["run_name"]: found["action"] for found in json_in(shown.stdout)}
    expected = {lost: "would stop", kept: "left", going: "left", service: "left", others: "left"}
    assert {run: actions.get(run.name) for run in expected} == expected
    assert mine.name not in actions
    assert shared_server.token not in shown.stdout + shown.stderr
    assert is_going(lost)

    reaper_run = components.trigger("reaper")
    components.wait_for_state("reaper", reaper_run, "success", "failed")
    assert over(lost).raw_status == "terminated"
    found = {one["run_name"]: one for one in components.result("reaper", reaper_run)}
    assert {run.name for run in expected} <= set(found)
    assert found[lost.name]["action"] == "stopped"
    assert found[lost.name]["state"] == "failed"
    assert {found[run.name]["action"] for run in (kept, going, service, others)} == {"left"}
    lines = components.log_lines("reaper", reaper_run)
    assert f"Stopping run {lost.name}: {lost.url}" in lines
    for run in (kept, going, service, others, mine):
        assert is_going(run), run

    gate.touch()
    components.wait_for_state("sync", going_run, "success")
    for run in (kept, service, others, mine):
        run.stop(abort=True)
