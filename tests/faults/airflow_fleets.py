"""DAG runs of Airflow with a fleet of their own, which are killed: the processes, and what users do."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.databases import DATABASE_URL, best_database

_DAGS = Path(__file__).parent.parent / "provider_airflow" / "killed_fleet_dags.py"
DAG_IDS = ("fleet_last_try", "fleet_retried", "fleet_endless")
_ENDLESS = DAG_IDS[-1]
_RUNS = "tests.provider_airflow.dag_run_processes"
KINDS = (
    "kill -9 of the task's process",
    "SIGTERM to the task's process",
    "kill -9 of the worker, then Airflow continues",
    "kill -9 of all, and the DAG run is given up",
    "the DAG run is marked failed",
    "the DAG run is cleared",
)
(_KILL, _TERMINATE, _WORKER, _GIVEN_UP, _FAILED, _CLEARED) = KINDS
# An upper bound for a busy machine; a wait returns as soon as its condition holds.
_SECONDS = 300.0
_PAUSE = 0.05


class Host:
    """An Airflow with an API server and a database; the processes of a DAG run are started for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([_RUNS])

    def undisturbed(self, name: str) -> float:
        """Run a DAG run to its end; return how long it took from the start of its first task on."""
        process = self._start_first_task(DAG_IDS[0], name)
        started = time.monotonic()
        self._ended(process)
        return time.monotonic() - started

    def kill_one(self, name: str, kind: str, moment: float, draw: int) -> str:
        """Kill a DAG run so many seconds after the start of its first task; let Airflow do what it then does.

        Returns what happened to which task; empty if the DAG run had ended before.
        """
        # What the reaper finds there is active.
        dag_id = _ENDLESS if kind == _GIVEN_UP else DAG_IDS[draw % 2]
        process = self._start_first_task(dag_id, name)
        process.join(moment)
        if not process.is_alive():
            return ""
        where = self._where(name)
        if kind in (_KILL, _TERMINATE):
            if not self._signal_task(process, kill=kind == _KILL):
                return ""
        elif kind in (_WORKER, _GIVEN_UP):
            self._kill_all(process)
            if kind == _GIVEN_UP:
                self._ended(self._start("abandon", dag_id, name))
                return where
            process = self._start("drive", dag_id, name)
        else:
            self._ended(self._start("fail" if kind == _FAILED else "clear", dag_id, name))
        self._ended(process)
        return where

    def reap(self) -> str:
        """Run the reaper's command once; return what it printed."""
        done = self._airflow("dstack", "reap", "--min-age", "0")
        return done.stdout + (done.stderr[-3000:] if done.returncode else "")

    def log(self, name: str) -> Path:
        """Return the file with the output of a DAG run's processes."""
        return self.home / f"{name}.out"

    @staticmethod
    def is_of(marker: str | None, name: str) -> bool:
        """Return whether a fleet or a run belongs to a DAG run."""
        return any((marker or "").startswith(f"airflow:{dag_id}/{name}/") for dag_id in DAG_IDS)

    def _airflow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("airflow")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    def _start(self, function: str, dag_id: str, name: str) -> BaseProcess:
        process = self._processes.Process(target=_call, args=(function, dag_id, name, str(self.log(name))))
        process.start()
        return process

    def _start_first_task(self, dag_id: str, name: str) -> BaseProcess:
        process = self._start("drive", dag_id, name)
        deadline = time.monotonic() + _SECONDS
        while not self._where(name) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return process

    def _ended(self, process: BaseProcess) -> None:
        process.join(_SECONDS)
        if process.is_alive():
            self._kill_all(process)
            raise TimeoutError(f"a DAG run did not end within {_SECONDS:.0f} s")
        if process.exitcode:
            raise RuntimeError(f"a process of the DAG run ended with {process.exitcode}")

    def _signal_task(self, process: BaseProcess, *, kill: bool) -> bool:
        """Signal the process of the task that runs, or of the next one; return whether there was one."""
        while process.is_alive():
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children():
                    child.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
                    return True
            time.sleep(_PAUSE)
        return False

    def _kill_all(self, process: BaseProcess) -> None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.join(30)

    def _where(self, name: str) -> str:
        started = [line for line in self._lines(name) if line.startswith(f"{name}: ")]
        return started[-1].partition(": ")[2].partition(",")[0] if started else ""

    def _lines(self, name: str) -> list[str]:
        with suppress(FileNotFoundError):
            return self.log(name).read_text(errors="replace").splitlines()
        return []


def _call(function: str, *arguments: str) -> None:
    # Airflow is imported in the processes of DAG runs only.
    getattr(importlib.import_module(_RUNS), function)(*arguments)


@contextmanager
def host(server: LocalServer) -> Iterator[Host]:
    """Start what DAG runs need: a database, Airflow's API server, a connection."""
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="airflow-fleets-"))
    try:
        (home / "dags").mkdir()
        shutil.copy(_DAGS, home / "dags")
        with best_database(home) as url:
            os.environ.update(_environment(home, url, server))
            with _api_server(home):
                made = Host(home)
                synced = made._airflow("dags", "reserialize")
                assert synced.returncode == 0, synced.stderr[-3000:]
                yield made
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path, database: str, server: LocalServer) -> dict[str, str]:
    port = free_port()
    connection: dict[str, Any] = {"conn_type": "dstack", "host": server.url, "login": server.project}
    connection["password"] = server.token
    return {
        "AIRFLOW_HOME": str(home),
        DATABASE_URL: database,
        "AIRFLOW_CONN_DSTACK_DEFAULT": json.dumps(connection),
        **{
            f"AIRFLOW__{name}": value
            for name, value in {
                "API__HOST": "127.0.0.1",
                "API__PORT": str(port),
                "API__SECRET_KEY": secrets.token_hex(32),
                "API__WORKERS": "1",
                "API_AUTH__JWT_SECRET": secrets.token_hex(32),
                "CORE__DAGS_FOLDER": str(home / "dags"),
                "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
                "CORE__EXECUTOR": "LocalExecutor",
                "CORE__FERNET_KEY": "",
                "CORE__LOAD_EXAMPLES": "False",
                "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            }.items()
        },
    }


@contextmanager
def _api_server(home: Path) -> Iterator[None]:
    command = [str(Path(sys.executable).with_name("airflow")), "api-server"]
    health = f"http://127.0.0.1:{os.environ['AIRFLOW__API__PORT']}/api/v2/monitor/health"
    with (home / "api-server.out").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + _SECONDS
        while True:
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(health, timeout=5).close()
                break
            assert process.poll() is None, (home / "api-server.out").read_text()[-3000:]
            assert time.monotonic() < deadline, "Airflow's API server does not answer"
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
