"""A real Prefect for the ways to end a task that waits for a run, and what it shows of each case in the end.

The processes are Prefect's own: its server, the process of ``serve()`` that starts one for each flow run, a worker,
and plain scripts. After all cases the reaper makes a pass, and each case is judged again by what Prefect shows in the
end: one event, one table and one progress artifact for each run that was reported as started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from uuid import UUID

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency import LatencyCase, NotReached, Way
from tests.faults.latency_judge import LatencyResult, Seen
from tests.faults.latency_matrix import try_latencies
from tests.faults.prefect_shown import FINAL, Api, disagreement, wait_until_over
from tests.ports import free_port
from tests.provider_prefect import hosts
from tests.provider_prefect.latency_flows import FLOWS
from tests.provider_prefect.support import until

_LOG = logging.getLogger(__name__)
_FLOWS = "tests.provider_prefect.latency_flows"
_RUNNER_FLOWS = "tests.provider_prefect.latency_runner_flows"
_FLOWS_FOLDER = Path(hosts.__file__).parent
# Only an environment of their own has Dask and Ray.
RUNNER_FLOWS = ("dask_sweep", "ray_sweep") if find_spec("prefect_dask") and find_spec("prefect_ray") else ()
# Seconds: how long a real server takes to end a run after a stop request.
_ENDING_SECONDS = 8.0
# Upper bounds for a busy machine; a wait returns as soon as its condition holds.
START_SECONDS = 300.0
OVER_SECONDS = 200.0


@dataclass
class Ended:
    """A case whose host has ended, with what to read again after the reaper's pass."""

    flow_run_id: UUID
    runs: Sequence[dstack.Run]
    case: LatencyCase
    has_artifacts: bool


@dataclass
class LatencyHost:
    """Prefect's processes for all cases, and the ended cases by way and fault."""

    api: Api
    server: LocalServer
    folder: Path
    ended: dict[tuple[str, str], Ended] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    processes: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    deployments: dict[str, UUID] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of Prefect's processes, and of the reaper."""
        return {
            **hosts.environment(self.folder),
            "PREFECT_API_URL": self.api.url,
            "DSTACK_SERVER_URL": self.server.url,
            "DSTACK_PROJECT": self.server.project,
            "DSTACK_TOKEN": self.server.token,
            "TEST_PIDS": str(self.folder),
            # To unpickle flows, Ray imports their module by the name that serve() gives it.
            "PYTHONPATH": os.pathsep.join([str(_FLOWS_FOLDER), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def close(self) -> None:
        """End the processes."""
        self.processes.close()

    def start(self, flow: str, case: LatencyCase) -> UUID:
        """Start a flow run of a deployment and return its id."""
        with self.lock:
            if flow not in self.deployments:
                self.deployments |= self._serve(_RUNNER_FLOWS if flow in RUNNER_FLOWS else _FLOWS)
        return self.api.start(
            self.deployments[flow], {"url": case.url, "project": self.server.project}, name=case.name
        )

    @contextlib.contextmanager
    def script(self, flow: str, case: LatencyCase) -> Iterator[subprocess.Popen[bytes]]:
        """Run a flow in a plain script."""
        arguments = (flow, case.url, self.server.project)
        log = self.folder / f"{case.name}.script"
        with hosts.module(_FLOWS, *arguments, log=log, environment=self.environment) as process:
            yield process

    def process_of(self, flow_run_id: UUID) -> int:
        """Return the id of a flow run's process."""
        return int((self.folder / str(flow_run_id)).read_text())

    def flow_run_of(self, process: int) -> UUID | None:
        """Return the flow run that a process executes, None if it does not execute one yet."""
        for path in self.folder.iterdir():
            with contextlib.suppress(ValueError, OSError):
                if int(path.read_text()) == process:
                    return UUID(path.name)
        return None

    def wait_for_runs(
        self, case: LatencyCase, flow_run_id: UUID, count: int = 1, *, has_artifacts: bool = True
    ) -> list[dstack.Run]:
        """Return the runs of a flow run once all are running and shown in Prefect."""

        def mine() -> list[dstack.Run]:
            state = self.api.state(flow_run_id)
            if state in ("FAILED", "CRASHED", "COMPLETED"):
                raise NotReached(f"expected a running flow run, got {state}")
            runs = case.client.runs.list()
            return [run for run in runs if f"/{flow_run_id}/" in (run.marker or "")]

        def all_running() -> list[dstack.Run]:
            found = mine()
            if [run.raw_status for run in found] != ["running"] * count:
                return []
            # A process that dies before it showed its run in Prefect leaves nothing to compare.
            shown = not has_artifacts or all(self.api.artifacts(flow_run_id, run.name)[1] for run in found)
            return found if shown else []

        return until(
            all_running, seconds=START_SECONDS, pause=0.5, what=f"{count} running runs of {flow_run_id}"
        )

    def wait_for_report(self, run: dstack.Run) -> None:
        """Wait until Prefect has the event of a run's end."""

        def is_reported() -> bool:
            return any(name in FINAL for name in self.api.events(run.id))

        until(is_reported, seconds=OVER_SECONDS, pause=0.5, what=f"the event of the end of {run.name}")

    def wait_for_hook(self, flow_run_id: UUID) -> None:
        """Wait until Prefect logs that a flow run's hook has ended."""

        def ended() -> bool:
            texts = [one.text for one in self.api.log(flow_run_id)]
            return any(one.startswith("Hook '") or "while running hook" in one for one in texts)

        until(ended, seconds=OVER_SECONDS, pause=0.5, what="the hook's end")

    def over(
        self,
        case: LatencyCase,
        flow_run_id: UUID,
        runs: Sequence[dstack.Run],
        expected: Sequence[str],
        process: int | None = None,
        *,
        has_artifacts: bool = True,
    ) -> Seen:
        """Return what Prefect shows once a flow run has ended, and keep the case for the last judgement."""
        state = wait_until_over(self.api, flow_run_id, OVER_SECONDS)
        if process is not None:
            until(
                lambda: not _lives(process),
                seconds=OVER_SECONDS,
                pause=0.5,
                what=f"the end of process {process}",
            )
        with self.lock:
            self.ended[case.way, case.fault.name] = Ended(flow_run_id, runs, case, has_artifacts)
        return Seen(state, expected, self.api.log(flow_run_id))

    def reap(self) -> None:
        """Run the reaper's command for one pass."""
        command = [sys.executable, "-m", "prefect_dstack", "reap", "--min-age", "0"]
        done = subprocess.run(
            command, cwd=hosts.ROOT, env=self.environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"the reaper failed: {done.stderr[-500:]}")

    def _serve(self, module: str) -> dict[str, UUID]:
        names = RUNNER_FLOWS if module == _RUNNER_FLOWS else FLOWS
        log = self.folder / f"{module}.log"
        process = self.processes.enter_context(
            hosts.module(module, "serve", log=log, environment=self.environment)
        )

        def deployed() -> dict[str, UUID]:
            assert process.poll() is None, f"the flows are not served:\n{log.read_text()[-3000:]}"
            found = self.api.deployments()
            return {name: found[name] for name in names} if found.keys() >= set(names) else {}

        return until(deployed, seconds=START_SECONDS, pause=0.5, what="the flows to be served")


def _lives(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def watch(case: LatencyCase, runs: Sequence[dstack.Run], limit: float) -> None:
    """Watch several runs; the case keeps one that was not stopped, else the last one."""
    stopped = []
    for run in runs:
        case.stopped_after = None
        case.watch(run, limit)
        stopped.append((case.stopped_after, run))
    left = next((one for one in stopped if one[0] is None), None)
    case.stopped_after, case.run = left or stopped[-1]


def try_all(
    host: LatencyHost,
    chosen: Mapping[str, Way],
    *,
    only: str = "",
    workers: int = 6,
) -> list[LatencyResult]:
    """Return the results of the chosen ways, also judged by what Prefect shows after the reaper's last pass."""
    results = try_latencies(host.server, chosen, host.reap, only=only, workers=workers)
    _end_all(host)
    host.reap()
    host.api.settle_events()
    return [_judged_again(host, result) for result in results]


def _end_all(host: LatencyHost) -> None:
    """Wait until all runs have ended; stop those of cases that were not reached."""
    deadline = time.monotonic() + OVER_SECONDS
    with host.server.client() as client:
        while active := [run for run in client.runs.list() if run.outcome() is None]:
            for run in active:
                if not dstack.RunStatus(run.raw_status).is_stopping:
                    run.stop(abort=True)
            if time.monotonic() > deadline:
                # The judgement of their cases shows what is missing.
                _LOG.error("still active: %s", [(run.name, run.raw_status, run.marker) for run in active])
                return
            time.sleep(1.0)


def _judged_again(host: LatencyHost, result: LatencyResult) -> LatencyResult:
    ended = host.ended.get((result.way, result.fault))
    if ended is None:
        return result
    flaws = [result.flaw] if result.flaw else []
    for run in ended.runs:
        run.refresh()
        flaws.append(disagreement(host.api, ended.flow_run_id, run, has_artifacts=ended.has_artifacts))
    if extra := _submitted_beside(host, ended):
        flaws.append(f"expected {len(ended.runs)} runs, got {extra} more")
    states = host.api.task_states(ended.flow_run_id)
    if "COMPLETED" in states:
        flaws.append("a task is shown as Completed")
    return replace(result, flaw="; ".join(dict.fromkeys(flaw for flaw in flaws if flaw)))


def _submitted_beside(host: LatencyHost, ended: Ended) -> int:
    with host.server.client() as client:
        marked = f"/{ended.flow_run_id}/"
        return sum(marked in (run.marker or "") for run in client.runs.list(all=True)) - len(ended.runs)


@contextlib.contextmanager
def served_to(api: str) -> Iterator[LatencyHost]:
    """Let the ways use the Prefect server at ``api``."""
    with (
        tempfile.TemporaryDirectory(prefix="prefect-latency-") as folder,
        LocalServer(step_seconds=0.02, stop_grace_seconds=_ENDING_SECONDS, retry_seconds=300.0) as server,
    ):
        host = LatencyHost(Api(api), server, Path(folder))
        try:
            yield host
        finally:
            host.close()


@contextlib.contextmanager
def host(settings: Mapping[str, str]) -> Iterator[LatencyHost]:
    """Start a private Prefect server, and stop it."""
    with tempfile.TemporaryDirectory(prefix="prefect-latency-") as name:
        folder = Path(name)
        environment = {
            **hosts.environment(folder),
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
            **settings,
        }
        with (
            hosts.prefect_server(free_port(), log=folder / "server", environment=environment) as api,
            served_to(api) as serving,
        ):
            yield serving
