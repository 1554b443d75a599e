"""Run Airflow's components as processes, and talk to their REST API."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests

from tests.ports import free_port
from tests.provider_airflow.support import wait_for


class Components:
    """An Airflow with its own home, ports and secrets; ``environment`` overrides the settings made here."""

    names: tuple[str, ...] = ("api-server", "scheduler", "dag-processor", "triggerer")

    def __init__(self, home: Path, database_url: str, environment: dict[str, str]) -> None:
        self.home = home
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: list[subprocess.Popen[bytes]] = []
        self.port, log_port, trigger_log_port = free_port(), free_port(), free_port()
        self._environment = {
            **os.environ,
            **{
                f"AIRFLOW__{name}": value
                for name, value in {
                    "API__BASE_URL": self.url,
                    "API__HOST": "127.0.0.1",
                    "API__PORT": str(self.port),
                    "API__SECRET_KEY": secrets.token_hex(32),
                    "API__WORKERS": "1",
                    "API_AUTH__JWT_SECRET": secrets.token_hex(32),
                    "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
                    "CORE__DAGS_FOLDER": str(home / "dags"),
                    "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
                    "CORE__EXECUTOR": "LocalExecutor",
                    "CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
                    "CORE__LOAD_EXAMPLES": "False",
                    "CORE__PARALLELISM": "4",
                    "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
                    "CORE__TEST_CONNECTION": "Enabled",
                    "DAG_PROCESSOR__PARSING_PROCESSES": "1",
                    "DAG_PROCESSOR__REFRESH_INTERVAL": "10",
                    "DATABASE__SQL_ALCHEMY_CONN": database_url,
                    "LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_log_port),
                    "LOGGING__WORKER_LOG_SERVER_PORT": str(log_port),
                    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
                    "SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
                    "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
                    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "15",
                }.items()
            },
            **environment,
            "AIRFLOW_HOME": str(home),
        }
        self._session = requests.Session()

    @property
    def url(self) -> str:
        """Return the address of the api-server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start all components; return when they are healthy and the DAGs are known."""
        for name in self.names:
            self.start_one(name)
        self.wait_until_healthy()
        token = self._session.get(f"{self.url}/auth/token", timeout=30).json()["access_token"]
        self._session.headers["Authorization"] = f"Bearer {token}"
        expected = {path.stem for path in (self.home / "dags").glob("*.py")}
        wait_for("parsed DAGs", lambda: expected <= self._dag_files(), 120)

    def wait_until_healthy(self) -> None:
        """Return when Airflow reports all components as healthy."""
        wait_for("healthy Airflow", self._is_healthy, 180)

    def start_one(self, name: str, **settings: str) -> None:
        """Start one component in a process group of its own; its output goes to a file in the home.

        A name such as ``triggerer-2`` starts a second one of its kind. ``settings`` are added to the
        environment of this one, such as ``AIRFLOW__CORE__PARALLELISM="1"``.
        """
        airflow = Path(sys.executable).with_name("airflow")
        environment = {**self._environment, **settings}
        kind = name.rstrip("-0123456789")
        if name != kind:
            environment["AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT"] = str(free_port())
            environment["AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT"] = str(free_port())
        with (self.home / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [airflow, *self._arguments(name, kind)],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _arguments(self, name: str, kind: str) -> list[str]:
        """Return the arguments of Airflow's command that starts a component."""
        return [kind]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of Airflow's commands with the components' database and connections."""
        return subprocess.run(
            [Path(sys.executable).with_name("airflow"), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def signal_one(self, name: str, number: signal.Signals) -> None:
        """Send a signal to all processes of one component."""
        os.killpg(self._processes[name].pid, number)

    def is_alive(self, name: str) -> bool:
        """Return whether the main process of one component runs."""
        return self._processes[name].poll() is None

    def ended_within(self, seconds: float, name: str) -> bool:
        """Return whether the main process of one component has ended, or ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[name].wait(seconds)
        return not self.is_alive(name)

    def knows(self, dag_id: str) -> bool:
        """Return whether the DAG can be started."""
        dags = self.call("GET", "/api/v2/dags?limit=100")["dags"]
        return dag_id in {dag["dag_id"] for dag in dags}

    def pid_of(self, name: str) -> int:
        """Return the process id of one component."""
        return self._processes[name].pid

    def start_ended(self) -> None:
        """Restart the components that ended by themselves, as a supervisor does; return when all are healthy."""

        def kept_healthy() -> bool:
            for name in [name for name in self._processes if not self.is_alive(name)]:
                self._wait_for_end(name)
                self.start_one(name)
            return self._is_healthy()

        wait_for("healthy Airflow", kept_healthy, 180, 0.5)

    def kill_one(self, name: str) -> None:
        """Kill one component as ``kill -9`` does; the tasks that a scheduler runs survive it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait(30)
        self._killed.append(process)

    def end_one(self, name: str) -> None:
        """Ask one component to end, and wait for that."""
        self._processes[name].terminate()
        self._wait_for_end(name)

    def stop(self) -> None:
        """End all components."""
        for process in self._processes.values():
            process.terminate()
        for name in list(self._processes):
            self._wait_for_end(name)
        for process in self._killed:
            _end_group(process)

    def _wait_for_end(self, name: str) -> None:
        process = self._processes.pop(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        _end_group(process)
        process.wait(30)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of one REST call. Raises on any error status.

        On SQLite one writer at a time: with five components writing, the API server answers some calls with
        "Database error" and rolls them back. Such a call is sent again.
        """

        def ask() -> list[requests.Response]:
            reply = self._session.request(method, f"{self.url}{path}", json=body, timeout=60)
            return [] if reply.status_code == 500 and "Database error" in reply.text else [reply]

        (reply,) = wait_for(f"{method} {path} without a database error", ask, 60.0)
        assert reply.ok, f"{method} {path}: {reply.status_code} {reply.text}"
        return reply.json() if reply.content else None

    def trigger(self, dag_id: str, **conf: Any) -> str:
        """Start a DAG run with these params; return its run id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.call("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def task(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return the task instance ``train`` of a DAG run."""
        found: dict[str, Any] = self.call(
            "GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/train"
        )
        return found

    def wait_for_state(self, dag_id: str, run_id: str, *states: str, seconds: float = 90.0) -> dict[str, Any]:
        """Return the task instance once it is in one of ``states``."""

        def look() -> dict[str, Any] | None:
            task = self.task(dag_id, run_id)
            return task if task["state"] in states else None

        return wait_for(f"task of {dag_id} in state {' or '.join(states)}", look, seconds)

    def wait_for_run_end(
        self, dag_id: str, run_id: str, seconds: float = 90.0, look_every: float = 0.1
    ) -> None:
        """Return once the DAG run has ended; Airflow may forget to run a task that is cleared before that."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}"

        def is_over() -> bool:
            return self.call("GET", path)["state"] in ("success", "failed")

        wait_for(f"end of {dag_id}", is_over, seconds, look_every)

    def set_state(self, dag_id: str, run_id: str, state: str) -> None:
        """Mark the task, as a user does."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/train"
        self.call("PATCH", path, {"new_state": state})

    def set_run_state(self, dag_id: str, run_id: str, state: str) -> None:
        """Mark the DAG run, as a user does."""
        self.call("PATCH", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}", {"state": state})

    def xcom(self, dag_id: str, run_id: str, key: str) -> Any:
        """Return an XCom of the task, or None if it is missing."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/train/xcomEntries"
        keys = {entry["key"] for entry in self.call("GET", path)["xcom_entries"]}
        return self.call("GET", f"{path}/{key}")["value"] if key in keys else None

    def clear(self, dag_id: str, run_id: str) -> None:
        """Clear the task, as a user does."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": ["train"],
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.call("POST", f"/api/v2/dags/{dag_id}/clearTaskInstances", body)

    def log(self, dag_id: str, run_id: str, attempt: int = 1) -> list[Any]:
        """Return the records of the task's log, with the errors in them."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/train/logs/{attempt}?full_content=true"
        records: list[Any] = self.call("GET", path)["content"]
        return records

    def log_lines(self, dag_id: str, run_id: str, attempt: int = 1) -> list[str]:
        """Return the lines of the task's log, in order."""
        records = self.log(dag_id, run_id, attempt)
        texts = [record if isinstance(record, str) else str(record.get("event", "")) for record in records]
        return [line for text in texts for line in text.split("\n")]

    def result(self, dag_id: str, run_id: str) -> Any:
        """Return the task's XCom."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/train/xcomEntries/return_value"
        return self.call("GET", path)["value"]

    def _is_healthy(self) -> bool:
        for name, process in self._processes.items():
            assert process.poll() is None, f"{name} ended: {(self.home / f'{name}.out').read_text()[-3000:]}"
        with contextlib.suppress(requests.RequestException, ValueError):
            health = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5).json()
            parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
            return all((health.get(part) or {}).get("status") == "healthy" for part in parts)
        return False

    def _dag_files(self) -> set[str]:
        dags = self.call("GET", "/api/v2/dags?limit=100")["dags"]
        return {Path(dag["fileloc"]).stem for dag in dags}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a component has left: its children may outlive it, and the group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
