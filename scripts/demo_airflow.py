"""Run the example DAG on an embedded dstack server, with nothing to set up and nothing left behind.

Run it with the Python of the Airflow environment. Exits with 0 only if the DAG run succeeded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DAG_FILE = REPOSITORY / "dags" / "example_dstack_run.py"
_STARTED = time.monotonic()


def say(text: str) -> None:
    """Show progress, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:5.1f} s] {text}", flush=True)


def configure_airflow(home: str) -> None:
    """Point Airflow at a home of its own, through the environment, which Airflow reads at import."""
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    os.environ.update(
        {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAG_FILE.parent),
            "AIRFLOW__CORE__FERNET_KEY": "",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
            "AIRFLOW__LOGGING__NAMESPACE_LEVELS": (
                "airflow.task.operators.airflow_provider_dstack=INFO airflow_provider_dstack=INFO"
            ),
        }
    )


def migrate() -> None:
    """Create the database in the home that Airflow points at."""
    airflow = Path(sys.executable).with_name("airflow")
    subprocess.run([airflow, "db", "migrate"], check=True, capture_output=True, timeout=300)


def run_example() -> tuple[str, dict[str, Any]]:
    """Run the DAG in this process; return its state and what its tasks returned."""
    spec = importlib.util.spec_from_file_location(DAG_FILE.stem, DAG_FILE)
    assert spec is not None  # noqa: S101 - the file is in this repository
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.dag.test()
    results = {ti.task_id: ti.xcom_pull(task_ids=ti.task_id) for ti in run.get_task_instances()}
    return str(run.state), results


def main() -> int:
    """Run the demo; return the exit status of the process."""
    from dstack_core.local import LocalServer

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="airflow-demo-") as home, LocalServer() as server:
        say(f"embedded dstack server on {server.url}")
        configure_airflow(home)
        os.environ["AIRFLOW_CONN_DSTACK_DEFAULT"] = json.dumps(
            {"conn_type": "dstack", "host": server.url, "login": server.project, "password": server.token}
        )
        say("creating Airflow's database ...")
        migrate()
        say("running the DAG example_dstack_run; the log of the run follows")
        state, results = run_example()
        say(f"the DAG run ended: {state}")
        outcome = results.get("train") or {}
        for name in ("run_name", "status", "exit_status", "instance", "duration", "cost"):
            say(f"  {name}: {outcome.get(name)}")
        return 0 if state == "success" else 1


if __name__ == "__main__":
    sys.exit(main())
