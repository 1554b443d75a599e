"""Airflow's own processes, one of which is killed while it sends a request; Airflow starts the next one.

The log of a task's try is read where a user reads it, from Airflow's API.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.airflow_log_lines import deaths_in, lines_of_try
from tests.faults.case import Adapter, Case, Ended
from tests.faults.judges import LINES
from tests.provider_airflow.components import Components
from tests.provider_airflow.databases import best_database
from tests.provider_airflow.keeper import TriggererKeeper

_DAGS = Path(__file__).parent.parent / "provider_airflow" / "dags"
_DAG_FILE = "killed_at_requests.py"
# As many tasks at once as the matrix tries cases.
_SETTINGS = {"AIRFLOW__CORE__PARALLELISM": "6"}
# An upper bound for a busy machine, on which many DAG runs are awaited at once; the wait returns as soon as the
# DAG run has ended.
_END_SECONDS = 600.0
_POLL_EVERY = 1.0
_HOSTS: list[Components] = []


class NotHeld(Exception):
    """Something that Airflow showed and must not show."""


@contextmanager
def host() -> Iterator[None]:
    """Run a private Airflow."""
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="airflow-kills-"))
    try:
        (home / "dags").mkdir()
        shutil.copy(_DAGS / _DAG_FILE, home / "dags")
        with best_database(home) as url:
            components = Components(home, url, _SETTINGS)
            try:
                components.start()
                with hosted_by(components):
                    yield
            finally:
                components.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def hosted_by(components: Components) -> Iterator[TriggererKeeper]:
    """Use a running Airflow for the cases, and restart its triggerer whenever it dies."""
    _HOSTS.append(components)
    try:
        with TriggererKeeper(components) as keeper:
            yield keeper
    finally:
        _HOSTS.remove(components)


def follow(case: Case, *, dag_id: str) -> Ended:
    """Let a DAG run follow the case's run; judge the logs of all tries but the last here."""
    airflow = _HOSTS[-1]
    # The token goes into a connection: Airflow shows the conf of a DAG run.
    connection = {"conn_type": "dstack", "host": case.url, "login": case.project, "password": case.token}
    airflow.call("POST", "/api/v2/connections", {"connection_id": case.name, **connection})
    dag_run = airflow.trigger(
        dag_id, connection=case.name, name=case.name, configuration=json.dumps(case.task)
    )
    airflow.wait_for_run_end(dag_id, dag_run, max(case.budget, _END_SECONDS), _POLL_EVERY)
    task = airflow.task(dag_id, dag_run)
    logs = [airflow.log(dag_id, dag_run, number) for number in range(1, task["try_number"] + 1)]
    deaths = deaths_in(airflow.home / "triggerer.out")
    *earlier, last = [lines_of_try(log, deaths) for log in logs]
    for number, one in enumerate(earlier, 1):
        if one.lines != LINES[: len(one.lines)]:
            what = f"{len(one.lines)} lines, {len(set(one.lines))} different, not the first in order"
            return Ended(last.lines, None, NotHeld(f"the log of try {number} has {what}"))
    if task["state"] != "success":
        end = str(logs[-1][-3:])[-2000:]
        return Ended(last.lines, None, NotHeld(f"the task is {task['state']}: {end}"))
    status = airflow.result(dag_id, dag_run)["status"]
    return Ended(last.lines, status, repeated=sum(one.repeated for one in (*earlier, last)))


ADAPTERS = {
    "Airflow task on a worker": Adapter(partial(follow, dag_id="killed")),
    "Airflow task, deferred": Adapter(partial(follow, dag_id="killed_deferred")),
}
