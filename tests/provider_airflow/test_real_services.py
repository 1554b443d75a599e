"""Services in a real Airflow: what becomes of them when their task is killed or cleared."""

from __future__ import annotations

import pytest

from airflow_provider_dstack._compat import trigger_has_on_kill
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import runs_of, wait_for
from tests.provider_airflow.test_real_components import running_run, seconds_until_over

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

_ANSWERS = "python3 -m http.server 8418 --bind 127.0.0.1"


def test_a_killed_task_stops_the_service_it_waits_for(
    components: Components, shared_server: LocalServer
) -> None:
    dag_run = components.trigger("service", command="sleep 600")
    run = running_run(shared_server, "service", dag_run)
    components.set_state("service", dag_run, "failed")
    seconds_until_over(run)
    assert run.raw_status == "terminated"


def test_a_cleared_task_replaces_its_service(components: Components, shared_server: LocalServer) -> None:
    dag_run = components.trigger("service", command=_ANSWERS)
    components.wait_for_state("service", dag_run, "success")
    first = running_run(shared_server, "service", dag_run)
    path = f"/api/v2/dags/service/dagRuns/{dag_run}/taskInstances/train/links"
    assert components.call("GET", path)["extra_links"] == {
        "dstack run": first.url,
        "dstack logs": first.logs_url,
        "dstack metrics": first.metrics_url,
        "dstack service": first.service_url,
    }
    components.wait_for_run_end("service", dag_run)
    components.clear("service", dag_run)

    def second() -> Run | None:
        newest = runs_of(shared_server, f"airflow:service/{dag_run}/")[0]
        return newest if newest.id != first.id else None

    run = wait_for("service of the second try", second)
    components.wait_for_state("service", dag_run, "success")
    # An ended DAG run starts again when it is cleared, and only the store of Airflow 3.3 knows the run before.
    assert first.refresh().raw_status == ("terminated" if trigger_has_on_kill() else "running")
    assert run.refresh().raw_status == "running"
    for one in (first, run):
        if one.outcome() is None:
            one.stop(abort=True)
