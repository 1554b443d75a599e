"""Flow runs of Prefect with a fleet of their own, which are killed: the processes, and what users do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling, Crashed

from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_prefect import hosts
from tests.provider_prefect.fleet_flows import FOLDER

T = TypeVar("T")

KINDS = (
    "the flow run is cancelled",
    "kill -9 of the flow's process",
    "SIGTERM to the flow's process",
    "kill -9 of a script, and its flow run is set to Crashed",
)
(_CANCELLED, _KILLED, _TERMINATED, _SCRIPT) = KINDS
_MODULE = "tests.provider_prefect.fleet_flows"
_DEPLOYMENT = "fleet-killed/fleet-killed"
# An upper bound for a busy machine; a wait returns as soon as its condition holds.
_SECONDS = 300.0
# How long Prefect's hooks may need after the end of a flow run on a slow server.
_HOOK_SECONDS = 90.0
_PAUSE = 0.1


class Host:
    """A Prefect server and a process that serves the flow."""

    def __init__(self, api: str, folder: Path, environment: dict[str, str], server: LocalServer) -> None:
        self.folder = folder
        self._api = api
        self._environment = environment
        self._server = server
        self._flow_runs: dict[str, UUID] = {}
        self._lock = threading.Lock()

    def client(self) -> SyncPrefectClient:
        """Return a new client of the Prefect server."""
        return SyncPrefectClient(self._api)

    def undisturbed(self, name: str) -> float:
        """Run a flow to its end; return how long it took from its first statement on."""
        self._serve_one(name)
        started = time.monotonic()
        self._end_of(name)
        return time.monotonic() - started

    def kill_one(self, name: str, kind: str, moment: float, draw: int) -> str:
        """Start a flow run and kill it so many seconds after its first statement; let Prefect do what it does.

        Returns what the server had then; empty if the flow run had ended before.
        """
        process = None
        if kind == _SCRIPT:
            process, pid = self._run_script(name)
        else:
            pid = self._serve_one(name)
        time.sleep(moment)
        with self.client() as client:
            state = client.read_flow_run(self._flow_runs[name]).state
            if state is not None and state.is_final():
                return ""
        where = self._where(name)
        if kind == _CANCELLED:
            self._set_state(name, Cancelling())
        else:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if kind == _TERMINATED else signal.SIGKILL)
        if process is not None:
            process.wait(_SECONDS)
            self._set_state(name, Crashed())
            return where
        self._end_of(name)
        self._until(lambda: not self._has(name), _HOOK_SECONDS)
        return where

    def reap(self) -> str:
        """Run the reaper's command once; return what it printed."""
        command = [str(Path(sys.executable).with_name("prefect-dstack")), "reap", "--min-age", "0"]
        if not Path(command[0]).exists():
            command[:1] = [sys.executable, "-m", "prefect_dstack"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, check=False, env=self._environment
        )
        return done.stdout + (done.stderr[-3000:] if done.returncode else "")

    def log(self, name: str) -> Path:
        """Return the file with the output of a flow run's process."""
        script = self.folder / f"{name}.out"
        return script if script.exists() else self.folder / "runner.out"

    def is_of(self, marker: str | None, name: str) -> bool:
        """Return whether a fleet or a run belongs to a flow run."""
        return name in self._flow_runs and f"/{self._flow_runs[name]}/" in f"{marker or ''}/"

    def _serve_one(self, name: str) -> int:
        def created() -> bool:
            # A busy Prefect server on sqlite refuses a writer now and then.
            with self.client() as client, suppress(PrefectHTTPStatusError):
                deployment = client.read_deployment_by_name(_DEPLOYMENT).id
                client.create_flow_run_from_deployment(deployment, parameters={"trial": name})
                return True
            return False

        self._until(created, _SECONDS, f"the flow run of {name}")
        return self._pid(name)

    def _run_script(self, name: str) -> tuple[subprocess.Popen[bytes], int]:
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, name],
                cwd=hosts.ROOT,
                env=self._environment,
                stdout=output,
                stderr=output,
            )
        return process, self._pid(name)

    def _pid(self, name: str) -> int:
        def written() -> str:
            with suppress(FileNotFoundError):
                return (self.folder / name).read_text()
            return ""

        pid, _, flow_run = self._until(written, _SECONDS, f"the first statement of {name}").partition(" ")
        self._flow_runs[name] = UUID(flow_run)
        return int(pid)

    def _end_of(self, name: str) -> None:
        with self.client() as client:

            def ended() -> bool:
                state = client.read_flow_run(self._flow_runs[name]).state
                return state is not None and state.is_final()

            self._until(ended, _SECONDS, f"the end of the flow run of {name}")

    def _set_state(self, name: str, state: Any) -> None:
        with self.client() as client:
            client.set_flow_run_state(self._flow_runs[name], state, force=state.is_crashed())

    def _where(self, name: str) -> str:
        with self._server.client() as client:
            runs = [one for one in client.runs.list(all=True) if self.is_of(one.marker, name)]
            if not runs:
                return "fleet" if self._has(name) else "before the fleet"
            return "run" if runs[0].outcome() is None else "after the run"

    def _has(self, name: str) -> bool:
        from tests.faults.fleets import left_of

        return bool(left_of(self._server, lambda marker: self.is_of(marker, name)))

    def _until(self, find: Callable[[], T], seconds: float, what: str = "") -> T:
        deadline = time.monotonic() + seconds
        while not (found := find()) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        if what and not found:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        return found


@contextmanager
def host(server: LocalServer) -> Iterator[Host]:
    """Start a private Prefect server, and a process that serves the flow."""
    with tempfile.TemporaryDirectory(prefix="prefect-fleets-") as name, ExitStack() as stack:
        folder = Path(name)
        environment = hosts.environment(folder)
        log = folder / "server"
        api = stack.enter_context(hosts.prefect_server(free_port(), log=log, environment=environment))
        environment |= {
            "PREFECT_API_URL": api,
            "DSTACK_SERVER_URL": server.url,
            "DSTACK_PROJECT": server.project,
            "DSTACK_TOKEN": server.token,
            FOLDER: str(folder),
        }
        runner = folder / "runner.out"
        process = stack.enter_context(hosts.module(_MODULE, "serve", log=runner, environment=environment))
        made = Host(api, folder, environment, server)

        def deployed() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the flow is not served:\n{runner.read_text()[-3000:]}")
            with made.client() as client, suppress(ObjectNotFound):
                client.read_deployment_by_name(_DEPLOYMENT)
                return True
            return False

        made._until(deployed, _SECONDS, "the flow to be served")
        yield made
