"""How to test your DAG: its files as a project of a user, with pytest run on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.user_project import files_of, run_tests, summary, write

PAGE = ROOT / "docs" / "how-to" / "test-your-dag.md"
SYNC = """\
# test_sync.py
import dags_sync


def test_the_sync_operator(dstack_server, dstack_scenario, dstack_time):
    dstack_scenario.capacity_after(1200, run="train")
    assert dags_sync.dag.test().state == "success"
    assert dstack_time.passed > 3600
    assert len(dstack_server.runs) == 1
    dstack_server.assert_one_run_per_try()
    dstack_server.assert_scenarios_happened()
"""


def test_the_page_is_a_project_whose_tests_pass(tmp_path: Path) -> None:
    write(tmp_path, files_of(PAGE, "python airflow test"))
    done = run_tests(tmp_path)
    assert summary(done).startswith("5 passed"), done.stdout + done.stderr


@pytest.mark.slow
def test_the_sync_operator_waits_in_virtual_time(tmp_path: Path) -> None:
    files = files_of(PAGE, "python airflow test")
    dag = (
        files["dags/train.py"].replace("deferrable=True", "deferrable=False").replace('"training"', '"sync"')
    )
    dag = dag[: dag.index("    @task.dstack")] + dag[dag.index("    train = ") :].replace(
        "    rate() >> train\n", ""
    )
    write(
        tmp_path,
        {"conftest.py": files["conftest.py"], "dags/dags_sync.py": dag, "test_sync.py": SYNC},
    )
    done = run_tests(tmp_path)
    assert summary(done).startswith("1 passed"), done.stdout + done.stderr
