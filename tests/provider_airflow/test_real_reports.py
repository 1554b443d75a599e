"""What a run reports in a real Airflow: live XComs from a triggerer, and a result of the largest size."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import wait_for
from tests.provider_airflow.test_results import message

pytestmark = pytest.mark.slow

# With the mark, the key and the quotes it is just below the limit of 1 MiB.
_LARGE = 1_048_000


def test_a_deferred_task_shows_metrics_while_it_runs_and_returns_a_large_result(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    large = f'awk \'BEGIN {{ printf "\\""; for (i = 0; i < {_LARGE}; i++) printf "x"; printf "\\"" }}\''
    waits = f"until [ -e {gate} ]; do sleep 0.1; done"
    command = f"sleep 12; {message('metric', step=3, loss=0.5)}; {waits}; {large} > $DSTACK_RESULT_FILE"
    dag_run = components.trigger("deferred", command=command)
    found = wait_for("metrics", lambda: components.xcom("deferred", dag_run, "dstack_metrics"))
    assert found == {"loss": {"value": 0.5, "step": 3}}
    assert components.task("deferred", dag_run)["state"] == "deferred"
    gate.touch()
    components.wait_for_state("deferred", dag_run, "success", seconds=120.0)
    assert components.result("deferred", dag_run)["result"] == "x" * _LARGE
