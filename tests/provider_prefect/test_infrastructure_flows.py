"""Flows of ``@dstack``: a real Prefect server, an embedded dstack server whose machine is this one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow, task
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, CrashedRun
from prefect.filesystems import LocalFileSystem
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_KEY, temporary_settings
from prefect.states import Crashed, Pending
from pydantic import SecretStr

from dstack_core import ConfigurationError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials
from prefect_dstack import dstack as on_a_machine
from prefect_dstack._flow_result import NoCarriedResult, newest
from prefect_dstack.reaper import reap

from .machines import START_SECONDS, cancel, new_pool, worker
from .support import (
    cancelled_when,
    interrupt_when_asked,
    is_running,
    log_records,
    outcome_of,
    set_state,
    state_of,
    submissions,
    the_run,
    until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.matrix,
    pytest.mark.usefixtures("prefect_server"),
]

Machine = Callable[..., Callable[[Any], Any]]


@dataclass
class Corpus:
    """A parameter that JSON would change."""

    words: tuple[str, ...]


class OutOfWords(ValueError):
    """An error of a flow."""


class CannotBePickled(ValueError):
    """An error whose pickle cannot be read: its constructor takes other arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.fixture(autouse=True)
def _python_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine's Python this one."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture
def machine(credentials: DstackCredentials) -> Machine:
    """Return ``@dstack`` for the embedded server."""
    return lambda *pool, **options: on_a_machine(
        *pool, **{"credentials": credentials, "poll_interval": 0.2, **options}
    )


def flow_runs(name: str) -> list[FlowRun]:
    """Return the flow runs of the flow with a name."""
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))


def spec_of(server: LocalServer) -> dict[str, Any]:
    reply = httpx.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        headers={"Authorization": f"Bearer {server.token}"},
        json={"run_name": the_run(server).name},
    )
    spec: dict[str, Any] = reply.json()["run_spec"]
    return spec


@task
def counted(corpus: Corpus) -> int:
    return len(corpus.words)


def test_a_call_returns_the_result_of_one_flow_run_on_a_machine(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    @machine(max_duration="1h", commands=["echo prepared"], env={"WORD": "a-word"})
    @flow(name=tmp_path.name, log_prints=True)
    def count(corpus: Any, more: int = 0) -> tuple[Corpus, int, str, int]:
        print("by-the-flow")  # noqa: T201
        return corpus, counted(corpus) + more, os.environ["WORD"], os.getpid()

    with temporary_settings({PREFECT_API_KEY: "pnu_of-the-caller"}):
        corpus, number, word, pid = count(Corpus(("a", "b")), more=1)
    assert (corpus, number, word) == (Corpus(("a", "b")), 3, "a-word")
    assert pid != os.getpid()
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    assert flow_run.state.is_completed()
    run = the_run(dstack)
    assert outcome_of(run).succeeded
    until(lambda: flow_runs(tmp_path.name)[0].infrastructure_pid == f"{dstack.project}:{run.name}")
    with get_client(sync_client=True) as client:
        names = [item.name for item in client.read_task_runs(flow_run_filter=_only(flow_run.id))]
    assert [name.partition("-")[0] for name in names] == ["counted"]
    messages = log_records(flow_run.id, last="by-the-flow")
    assert any("prepared" in message for message in messages)
    spec = spec_of(dstack)
    assert spec["configuration"]["max_duration"] == 3600
    assert "pnu_of-the-caller" not in str(spec)


def _only(flow_run_id: UUID) -> FlowRunFilter:
    return FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))


def test_an_async_flow_is_awaited_and_is_a_subflow_run_of_its_caller(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    @machine()
    @flow(name=tmp_path.name)
    async def upper(words: set[str]) -> set[str]:
        return {word.upper() for word in words}

    @flow
    async def outer() -> tuple[UUID, set[str]]:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return context.flow_run.id, await upper({"a"})

    outer_id, words = asyncio.run(outer())
    assert words == {"A"}
    (flow_run,) = flow_runs(tmp_path.name)
    with get_client(sync_client=True) as client:
        assert flow_run.parent_task_run_id is not None
        assert client.read_task_run(flow_run.parent_task_run_id).flow_run_id == outer_id


def test_a_flow_raises_its_own_error_after_its_retries(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"

    @machine()
    @flow(retries=1, name=tmp_path.name)
    def failing() -> None:
        with tries.open("a") as file:
            file.write("x")
        raise OutOfWords("none left")

    with pytest.raises(OutOfWords, match="none left"):
        failing()
    assert tries.read_text() == "xx"
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    assert flow_run.state.is_failed()
    # The machine did what it had to.
    assert outcome_of(the_run(dstack)).succeeded


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_secrets_are_in_no_log_state_or_error_of_a_flow(
    machine: Machine, dstack: LocalServer, tmp_path: Path, kind: str
) -> None:
    secret, block, login = "sk-dflow-secret-1", "license-of-a-block", "hunter22-x"
    Secret(value=SecretStr(block)).save("lic", overwrite=True)
    env = {
        "API_KEY": secret,
        "LIC": "{{ prefect.blocks.secret.lic }}",
        "DB": f"postgres://me:{login}@db/x",
        "STAGE": "training-stage",
    }

    def body() -> None:
        shown = " ".join(os.environ[name] for name in env)
        print(f"printed {shown}")  # noqa: T201
        get_run_logger().warning("logged %s", shown)
        sys.stdout.write(f"written {shown}\n")
        raise OutOfWords(f"raised {shown}", {"also": shown})

    async def abody() -> None:
        body()

    function: Callable[[], Any] = abody if kind == "async" else body
    failing = machine(env=env)(flow(name=tmp_path.name, log_prints=True)(function))
    with pytest.raises(OutOfWords, match="raised") as caught:
        asyncio.run(failing()) if kind == "async" else failing()
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    messages = log_records(flow_run.id, last="written")
    shown = [str(caught.value), str(flow_run.state.message), "\n".join(messages)]
    assert not [text for text in shown if any(each in text for each in (secret, block, login))]
    assert all("raised *** *** postgres:***db/x training-stage" in text for text in shown)
    for word in ("printed", "logged", "written"):
        assert any(f"{word} *** *** postgres:***db/x training-stage" in each for each in messages)


def test_a_mask_env_that_no_variable_has_is_refused_before_anything_is_submitted(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    @machine(env={"LICENSE": "lic12345"}, mask_env=["LICENCE"])
    @flow(name=tmp_path.name)
    def licensed() -> None: ...

    with pytest.raises(ConfigurationError, match=r"mask_env: .* got 'LICENCE'\. Did you mean 'LICENSE'"):
        licensed()
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    assert "mask_env" in str(flow_run.state.message)
    with dstack.client() as client:
        assert client.runs.list(all=True) == []


@pytest.mark.parametrize("way", ["result", "error"])
def test_what_cannot_be_sent_back_is_named(machine: Machine, way: str) -> None:
    @machine()
    @flow
    def unsendable() -> Any:
        if way == "error":
            raise CannotBePickled("one", "two")
        return threading.Lock()

    with pytest.raises(NoCarriedResult if way == "result" else Exception) as caught:
        unsendable()
    wanted = "result_storage" if way == "result" else "one two"
    assert wanted in str(caught.value)


def test_a_state_has_the_result_and_the_flow_run_can_be_executed_again(
    machine: Machine, tmp_path: Path
) -> None:
    @machine()
    @flow(name=tmp_path.name)
    def half(number: int) -> float:
        if not Path(tmp_path / "again").exists():
            raise OutOfWords("not yet")
        return number / 2

    state = half(3, return_state=True)
    assert state.is_failed()
    with pytest.raises(OutOfWords):
        state.result()
    (tmp_path / "again").touch()
    (flow_run,) = flow_runs(tmp_path.name)
    assert asyncio.run(half.retry(flow_run)) == 1.5
    assert len(flow_runs(tmp_path.name)) == 1
    assert half.with_options(name="other").name == "other"


def test_a_result_storage_of_the_flow_is_used(machine: Machine, tmp_path: Path) -> None:
    storage: Any = LocalFileSystem(basepath=str(tmp_path / "results"))
    storage.save("of-machines", overwrite=True)

    @machine()
    @flow(persist_result=True, result_storage=storage, name=tmp_path.name)
    def stored() -> str:
        return "in the storage"

    assert stored() == "in the storage"
    assert list((tmp_path / "results").iterdir())
    assert asyncio.run(newest(flow_runs(tmp_path.name)[0].id, "result")) is None


def test_submit_returns_a_future_while_the_flow_runs(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    go = tmp_path / "go"

    @machine()
    @flow
    def waiting(number: int) -> int:
        while not go.exists():
            time.sleep(0.1)
        return number

    future = waiting.submit(7)
    until(lambda: future.state.is_running(), seconds=START_SECONDS)
    with pytest.raises(TimeoutError, match="expected its end within 0"):
        future.result(timeout=0.1)
    go.touch()
    assert future.result() == 7
    assert future.state.result() == 7
    # The thread that watches the machine ends before the server does.
    until(lambda: the_run(dstack).outcome(), seconds=60)


def test_a_worker_of_the_pool_runs_the_flow(dstack: LocalServer, tmp_path: Path) -> None:
    pool = f"pool-{tmp_path.name.replace('_', '-')}"
    storage = tmp_path / "seen"

    @on_a_machine(pool, poll_interval=0.2)
    @flow
    def count(corpus: Any) -> int:
        storage.write_text("x")
        return len(corpus.words)

    future = count.submit_to_work_pool(Corpus(("a", "b")))
    assert future.state.is_scheduled()
    with worker(dstack, pool, tmp_path / "log"):
        assert future.result(timeout=START_SECONDS) == 2
        until(lambda: the_run(dstack).outcome(), seconds=60)
    assert storage.exists()
    assert asyncio.run(newest(future.flow_run_id, "bundle")) is None


def test_a_cancelled_flow_run_stops_its_machine(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    @machine()
    @flow
    def endless() -> None:
        (tmp_path / "running").touch()
        while True:
            time.sleep(0.1)

    future = endless.submit()
    with cancelled_when((tmp_path / "running").exists, [future.flow_run_id]), pytest.raises(CancelledRun):
        future.result()
    until(lambda: the_run(dstack).outcome(), seconds=120)
    assert state_of(future.flow_run_id).is_cancelled()


def test_ctrl_c_stops_the_machine_and_cancels_the_flow_run(
    machine: Machine, dstack: LocalServer, tmp_path: Path
) -> None:
    @machine()
    @flow(name=tmp_path.name)
    def endless() -> None:
        while True:
            time.sleep(0.1)

    thread = interrupt_when_asked(dstack)
    with pytest.raises(KeyboardInterrupt):
        endless()
    thread.join()
    until(lambda: the_run(dstack).outcome(), seconds=60)
    assert outcome_of(the_run(dstack)).status == "terminated"
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    assert flow_run.state.is_cancelled()


def test_a_cancelled_caller_stops_the_machine(machine: Machine, dstack: LocalServer, tmp_path: Path) -> None:
    callers: list[UUID] = []

    @machine()
    @flow(name=tmp_path.name)
    def endless() -> None:
        (tmp_path / "running").touch()
        while True:
            time.sleep(0.1)

    @flow
    def outer() -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        callers.append(context.flow_run.id)
        endless()

    with cancelled_when((tmp_path / "running").exists, callers), pytest.raises(CancelledRun):
        outer()
    until(lambda: the_run(dstack).outcome(), seconds=60)
    assert outcome_of(the_run(dstack)).status == "terminated"
    (flow_run,) = flow_runs(tmp_path.name)
    assert flow_run.state is not None
    assert flow_run.state.is_cancelled()


def test_a_machine_that_fails_is_a_crash_with_its_last_lines(machine: Machine) -> None:
    @machine(commands=["echo no-such-driver", "exit 3"])
    @flow
    def never() -> None:
        """Do nothing."""

    with pytest.raises(CrashedRun, match="no-such-driver"):
        never()


SCRIPT = """
import time
from pathlib import Path
from prefect import flow
from prefect_dstack import dstack
from helper import started

@dstack(poll_interval=0.2)
@flow(name="FLOW_NAME")
def endless(folder: str) -> None:
    started(folder)
    while True:
        time.sleep(0.1)

if __name__ == "__main__":
    endless(str(Path(__file__).parent))
"""


@pytest.fixture
def killed(dstack: LocalServer, tmp_path: Path) -> FlowRun:
    """Return the flow run of a script that was killed while its flow ran on the machine."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("FLOW_NAME", tmp_path.name))
    helper = "from pathlib import Path\n\ndef started(folder):\n    (Path(folder) / 'started').touch()\n"
    (tmp_path / "helper.py").write_text(helper)
    target = {
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
        "DSTACK_SERVER_URL": dstack.url,
        "DSTACK_PROJECT": dstack.project,
        "DSTACK_TOKEN": dstack.token,
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, **target}, stdout=log, stderr=log
        )
    try:
        until((tmp_path / "started").exists, seconds=START_SECONDS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return flow_runs(tmp_path.name)[0]


def test_the_reaper_finds_the_machine_of_a_caller_that_was_killed(
    killed: FlowRun, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    assert is_running(dstack)
    assert [item["stopped"] for item in reap(credentials, min_age=0)] == [False]
    set_state(killed.id, Crashed())
    assert [item["stopped"] for item in reap(credentials, min_age=0)] == [True]
    until(lambda: the_run(dstack).outcome(), seconds=60)


def test_a_worker_takes_over_from_a_caller_that_was_killed(
    killed: FlowRun, dstack: LocalServer, tmp_path: Path
) -> None:
    with get_client(sync_client=True) as client:
        lost = client.create_flow_run(
            flow(anything),
            work_pool_name="dstack",
            job_variables={"dstack_bundle": "caller"},
            state=Pending(),
        )
    with worker(dstack, "dstack", tmp_path / "worker-log", name=tmp_path.name):
        until(lambda: state_of(lost.id).is_final(), seconds=START_SECONDS)
        log_records(killed.id, last="watches this flow run from now on", seconds=START_SECONDS)
        cancel(killed)
        until(lambda: the_run(dstack).outcome(), seconds=120)
    assert state_of(lost.id).is_crashed()
    assert state_of(lost.id).message == "Its caller ended before it had submitted the machine."


def anything(value: Any) -> None:
    """Take any value."""


def test_a_wrong_call_submits_nothing(machine: Machine, dstack: LocalServer, tmp_path: Path) -> None:
    with get_client(sync_client=True) as client:
        other = f"process-{new_pool()}"
        client.create_work_pool(WorkPoolCreate(name=other, type="process"))

    @flow
    def plain(number: int) -> int:
        return number

    with pytest.raises(Exception, match="number"):
        machine()(plain)("three")
    with pytest.raises(ConfigurationError, match=r'work_pool: expected .* type "dstack", got .* "process"'):
        machine(other)(plain)(3)
    with pytest.raises(ConfigurationError, match="credentials: expected the name of a saved block"):
        machine()(plain).submit_to_work_pool(3)
    with (
        socket.socket() as connection,
        pytest.raises(ConfigurationError, match="expected a flow and parameters that can be pickled"),
    ):
        machine()(flow(anything))(connection)
    assert submissions(dstack) == 0


def test_no_result_is_a_result(machine: Machine) -> None:
    bound = machine()(flow(anything))
    assert bound(1) is None
    assert bound(1, return_state=True).result() is None
