"""Flow runs of a real Prefect whose processes are killed, and which are executed again until they end."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Scheduled

from tests.faults.case import Adapter, Case, Ended
from tests.faults.judges import LINES
from tests.ports import free_port
from tests.provider_prefect import hosts
from tests.provider_prefect.killed_flows import ENDED, FLOWS

T = TypeVar("T")

_SERVES = "tests.provider_prefect.killed_flows"
# An upper bound for a busy machine; a wait returns as soon as its condition holds.
_SECONDS = 300.0
# Several cases ask one server, whose database answers 503 while it is locked for long: not more often than needed.
_PAUSE = 0.5
_BUSY = 503
# One kill needs two executions; more are for a process that dies on a busy machine.
_EXECUTIONS = 4
# The most records that Prefect returns at once.
_PAGE = 200


@dataclass(frozen=True)
class Record:
    """A log record of one execution of the task."""

    task_run_id: UUID | None
    message: str


class FlowHost:
    """A process that serves the flows to the Prefect server at ``api``, started with the first case."""

    def __init__(self, api: str, folder: Path) -> None:
        self._api = api
        self._folder = folder
        self._lock = threading.Lock()
        self._processes = contextlib.ExitStack()
        self._served: dict[str, dict[str, UUID]] = {}

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def client(self) -> SyncPrefectClient:
        """Return a new client of that server, whatever server the settings of this process name."""
        return SyncPrefectClient(self._api)

    def deployment(self, flow: str, token: str) -> UUID:
        """Return the deployment of a flow whose processes have the token in their environment."""
        with self._lock:
            if token not in self._served:
                self._served[token] = self._serve(token)
            return self._served[token][flow]

    def _serve(self, token: str) -> dict[str, UUID]:
        log = self._folder / "runner"
        environment = {**_environment(self._folder), "PREFECT_API_URL": self._api, "DSTACK_TOKEN": token}
        process = self._processes.enter_context(hosts.module(_SERVES, log=log, environment=environment))

        def deployed() -> dict[str, UUID]:
            if process.poll() is not None:
                raise RuntimeError(f"the flows are not served:\n{log.read_text()[-3000:]}")
            try:
                with self.client() as client:
                    return {name: client.read_deployment_by_name(f"{name}/{name}").id for name in FLOWS}
            except ObjectNotFound:
                return {}

        return _until(deployed, "the flows to be served")


@dataclass(frozen=True)
class Execution:
    """One flow run of a host, executed again if its process dies."""

    host: FlowHost
    id: UUID

    @classmethod
    def start(cls, host: FlowHost, flow: str, case: Case) -> Execution:
        """Start the flow that follows the case's run."""
        deployment = host.deployment(flow, case.token)
        parameters = {
            "url": case.url,
            "project": case.project,
            "configuration": case.task,
            "options": {
                "run_name": case.name,
                "poll_interval": case.poll_interval,
                "retry_budget": case.budget,
            },
        }
        with host.client() as client:
            return cls(host, client.create_flow_run_from_deployment(deployment, parameters=parameters).id)

    def to_the_end(self) -> State[object]:
        """Return the state in which the flow run ended; a crashed flow run is executed again."""
        with self.host.client() as client:

            def final() -> State[object] | None:
                state = client.read_flow_run(self.id).state
                return state if state is not None and state.is_final() else None

            for _ in range(_EXECUTIONS):
                state = _until(final, f"the end of flow run {self.id}")
                if not state.is_crashed():
                    return state
                client.set_flow_run_state(self.id, Scheduled(name="AwaitingRetry"), force=True)
        raise RuntimeError(f"the flow run crashed {_EXECUTIONS} times: {state.message}")

    def records(self) -> list[Record]:
        """Return all records in order, once the last one has arrived."""
        found: list[Record] = []
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self.id]))
        with self.host.client() as client:

            def last() -> bool:
                latest = client.read_logs(chosen, limit=10, sort=LogSort.TIMESTAMP_DESC)
                return any(log.message.startswith(ENDED) for log in latest)

            _until(last, f"the last record of flow run {self.id}")
            while len(found) % _PAGE == 0:
                page = client.read_logs(chosen, limit=_PAGE, offset=len(found), sort=LogSort.TIMESTAMP_ASC)
                found += [Record(log.task_run_id, log.message) for log in page]
                if not page:
                    break
        return found


def _judged(records: list[Record]) -> Ended:
    """Return the lines of the last execution; wrong lines of an earlier one are an error."""
    status = next(one.message.removeprefix(ENDED) for one in records if one.message.startswith(ENDED))
    by_execution: dict[UUID, list[str]] = defaultdict(list)
    for record in records:
        if record.task_run_id is not None:
            by_execution[record.task_run_id] += record.message.splitlines()
    *earlier, last = (
        [line.strip() for line in lines if line.strip().startswith("line-")]
        for lines in by_execution.values()
    )
    for lines in earlier:
        if lines != LINES[: len(lines)]:
            return Ended(last, status, AssertionError(f"the killed execution logged {_in_short(lines)}"))
    return Ended(last, status)


def _in_short(lines: list[str]) -> str:
    wrong = next(at for at, line in enumerate(lines) if LINES[at : at + 1] != [line])
    return f"{len(lines)} lines, {len(set(lines))} different; no. {wrong + 1} is {lines[wrong]}"


_HOSTS: list[FlowHost] = []


def _follow(flow: str) -> Callable[[Case], Ended]:
    def follow(case: Case) -> Ended:
        execution = Execution.start(_HOSTS[-1], flow, case)
        state = execution.to_the_end()
        if not state.is_completed():
            raise RuntimeError(f"the flow run is {state.name}: {state.message}")
        return _judged(execution.records())

    return follow


@contextlib.contextmanager
def served_to(api: str) -> Iterator[FlowHost]:
    """Let the adapters use the Prefect server at ``api``."""
    with tempfile.TemporaryDirectory(prefix="prefect-kills-") as folder:
        host = FlowHost(api, Path(folder))
        _HOSTS.append(host)
        try:
            yield host
        finally:
            _HOSTS.remove(host)
            host.close()


@contextlib.contextmanager
def host() -> Iterator[None]:
    """Start a private Prefect server, and stop it."""
    with tempfile.TemporaryDirectory(prefix="prefect-kills-") as name:
        folder = Path(name)
        environment = _environment(folder)
        with (
            hosts.prefect_server(free_port(), log=folder / "server", environment=environment) as api,
            served_to(api),
        ):
            yield


def _environment(folder: Path) -> dict[str, str]:
    # With the default interval, a process that is killed early has not sent any log record yet.
    return hosts.environment(folder) | {"PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.1"}


def _until(find: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + _SECONDS
    while not (found := _unless_busy(find)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_SECONDS:.0f} s for {what}")
        time.sleep(_PAUSE)
    return found


def _unless_busy(find: Callable[[], T | None]) -> T | None:
    try:
        return find()
    except PrefectHTTPStatusError as error:
        if error.response.status_code != _BUSY:
            raise
        return None


ADAPTERS = {
    "Prefect flow, sync task": Adapter(_follow("killed")),
    "Prefect flow, async task": Adapter(_follow("akilled")),
}
