"""Some ways to end a task on a server that is slow or drops the stop; `make test-faults` tries all of them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.faults.airflow_latency import Ways
from tests.faults.latency import LATENCIES, LatencyProxy
from tests.faults.latency_judge import LatencyResult
from tests.faults.latency_matrix import try_latencies
from tests.faults.loop import Loop
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import DagRunner, connection_json, over, runs_of, wait_for
from tests.provider_airflow.versions import MINOR
from tests.rig.server import RealServer

_CASES = [
    ("marked failed", "each reply 2.5 s"),
    ("marked failed", "drops every stop"),
    ("DAG run failed", "drops the stop once"),
    ("exception, last try", "each reply 4 s"),
    ("execution_timeout", "each reply 2.5 s"),
    ("marked failed, deferred", "drops every stop"),
    ("execution_timeout, deferred", "drops it three times"),
    ("teardown", "each reply 10 s"),
]


@pytest.fixture(scope="module")
def results(
    components: Components, shared_server: LocalServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], LatencyResult]:
    """Try the cases, four at once: they mostly wait."""
    ways = Ways(components, tmp_path_factory.mktemp("gates"))
    only = "|".join(f"^{way}, {fault}$" for way, fault in _CASES)
    found = try_latencies(shared_server, ways.all(), ways.reap, only=only, workers=4)
    return {(one.way, one.fault): one for one in found}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: ", ".join(case))
def test_an_ended_task_stops_its_run_or_names_its_page(
    case: tuple[str, str], results: dict[tuple[str, str], LatencyResult]
) -> None:
    if MINOR < (3, 2) and case[1] == "drops every stop":
        pytest.skip("Airflow has the reaper's command since 3.2")
    assert not results[case].flaw, results[case]


@pytest.mark.real
def test_a_timeout_stops_the_run_on_a_real_server_that_is_slow(
    dag_runner: DagRunner,
    real_server: RealServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (slow,) = [one for one in LATENCIES if one.longest == 4.0]
    begun = tmp_path / "running"
    with Loop() as loop, LatencyProxy(loop, real_server.url, slow) as proxy:

        def begin_when_it_runs() -> None:
            wait_for("running job", begun.exists, 120)
            proxy.begin()

        threading.Thread(target=begin_when_it_runs, daemon=True).start()
        connection = json.loads(connection_json(real_server)) | {"host": proxy.url}
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", json.dumps(connection))
        ended = dag_runner.run(
            f"configuration=Task(commands=['touch {begun}', 'sleep 600']), poll_interval=0.5, "
            "execution_timeout=timedelta(seconds=30)"
        )
        (run,) = runs_of(real_server, ended.marker)
        assert ended.task_state == "failed"
        assert begun.exists(), "expected a run that was running before the timeout"
        assert over(run).raw_status == "terminated"
        assert f"/projects/{real_server.project}/runs/{run.id}" in capfd.readouterr().out
