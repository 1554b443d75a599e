"""``client.functions`` on the embedded server: a function runs in a run, and its value comes back.

Every case runs through both clients.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
import requests

from dstack_core import (
    AsyncClient,
    Client,
    ConfigurationError,
    FunctionRun,
    FunctionSkipped,
    NoResultError,
    RemoteFunctionError,
    Reported,
    RunFailedError,
    RunNameTakenError,
    RunStoppedError,
    RunUserError,
    SharedAsyncClient,
    Task,
    UnusableFunctionError,
    WaitTimeoutError,
)
from dstack_core.aio_functions import AsyncFunctionCollection
from dstack_core.functions import FunctionCollection
from dstack_core.integration import FunctionCall, report_key
from dstack_core.local import LocalServer

FACTOR = 40
# The Python of the tests; the embedded server's runs find another one first.
OWN_PYTHON = [f"export PATH={Path(sys.executable).parent}:$PATH"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.01, stop_grace_seconds=0.5) as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


Call = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, server: LocalServer, client: Client) -> Call:
    """Return ``client.functions.run`` of one of the clients, with a short poll interval."""

    async def run(*args: Any, **kwargs: Any) -> Any:
        target: Any = {"server_url": server.url, "project_name": server.project, "user_token": server.token}
        async with AsyncClient(**target) as own:
            return await own.functions.run(*args, **kwargs)

    def either(*args: Any, **kwargs: Any) -> Any:
        kwargs = {"poll_interval": 0.05, **kwargs}
        if request.param == "async":
            return asyncio.run(run(*args, **kwargs))
        return client.functions.run(*args, **kwargs)

    return either


def train(rate: float, words: list[str], *, day: str = "") -> dict[str, Any]:
    import os

    for step in range(3):
        print(f"step-{step}")
    print("no line end", end="")
    return {"rate": rate * int(os.environ.get("FACTOR", "1")), "words": words, "day": day}


def test_a_function_runs_and_its_value_comes_back(call: Call) -> None:
    lines: list[str] = []
    value = call(train, 0.5, ("a", "\u00fc"), day="monday", env={"FACTOR": "3"}, on_log=lines.append)
    assert value == {"rate": 1.5, "words": ["a", "\u00fc"], "day": "monday"}
    assert lines == ["step-0", "step-1", "step-2", "no line end"]
    assert call(functools.partial(train, 1), [], env={"FACTOR": "3"})["rate"] == 3


def returns(value: Any) -> Any:
    return value


def not_a_number() -> Any:
    return [float("nan"), float("inf")]


async def later(value: Any) -> Any:
    import asyncio

    await asyncio.sleep(0)
    return value


def test_values_of_every_kind_and_size_come_back(call: Call) -> None:
    for value in (None, True, 1, 1.5, "", "\x00\n::dstack::{", {"a": [{"b": None}]}, "x" * 100_000):
        assert call(returns, value) == value
    assert call(later, 3) == 3
    assert [repr(each) for each in call(not_a_number)] == ["nan", "inf"]


def raises() -> None:
    print("before")
    raise KeyError("no such weight " + "x" * 1000 + "\n" * 30)


def test_an_exception_comes_back(call: Call) -> None:
    lines: list[str] = []
    with pytest.raises(RemoteFunctionError, match="raises raised an exception in run raises-") as caught:
        call(raises, on_log=lines.append)
    error = caught.value
    assert (error.type_name, error.outcome.exit_status) == ("KeyError", 1)
    assert error.text.startswith("'no such weight xxx")
    assert len(error.traceback) <= 20
    assert all(len(line) <= 500 for line in error.traceback)
    assert "main.py" not in "".join(error.traceback)
    assert 'raise KeyError("no such weight "' in "\n".join(lines)


def exits(status: Any) -> None:
    import sys

    sys.exit(status)


def test_an_exit_is_that_of_the_run(call: Call) -> None:
    for status, wanted in [(99, 99), ("no disk", 1)]:
        lines: list[str] = []
        with pytest.raises(RunFailedError) as caught:
            call(exits, status, on_log=lines.append)
        assert type(caught.value) is RunUserError
        assert caught.value.outcome.exit_status == wanted
        assert lines == (["no disk"] if wanted == 1 else [])
    assert call(exits, 0) is None
    assert call(exits, None) is None


def skips() -> None:
    import dstack_report

    dstack_report.metric(loss=0.5)
    dstack_report.skip("nothing new")


def test_a_function_reports_and_skips(call: Call) -> None:
    events: list[Any] = []
    with pytest.raises(FunctionSkipped, match="nothing new") as caught:
        call(skips, on_event=events.append)
    assert (caught.value.reason, caught.value.outcome.succeeded) == ("nothing new", True)
    assert [event.payload for event in events if isinstance(event, Reported) and event.kind == "metric"] == [
        {"loss": 0.5}
    ]
    # Without the file that travels there is no such module.
    with pytest.raises(RemoteFunctionError, match="No module named 'dstack_report'"):
        call(skips, reports=False)


def returns_a_set() -> Any:
    return {"a": [{1, 2}]}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (returns_a_set, {}, r"the result\['a'\]\[0\]: expected a value that JSON can carry, got set"),
        (
            functools.partial(returns, "x" * 99),
            {"max_result_bytes": 100},
            r"expected at most 100 bytes \(max_result_bytes\), got 101",
        ),
        (
            functools.partial(returns, 1),
            {"env": {"PATH": "/nowhere"}},
            "expected python3 in the run, got none",
        ),
    ],
)
def test_a_call_that_can_never_work_reports_why(
    call: Call, function: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnusableFunctionError, match=message):
        call(function, **options)


def test_a_command_that_fails_differs_from_a_missing_python(call: Call) -> None:
    with pytest.raises(RunFailedError) as caught:
        call(returns, 1, commands=["exit 5"])
    assert (type(caught.value), caught.value.outcome.exit_status) == (RunUserError, 5)
    with pytest.raises(RunFailedError) as caught:
        call(returns, 1, commands=["false"])
    assert type(caught.value) is RunUserError


def vanishes() -> None:
    import os

    os._exit(0)


def test_a_success_without_a_result_is_an_error(client: Client) -> None:
    submitted = client.functions.submit(vanishes)
    slept: list[float] = []
    submitted.run.wait(poll_interval=0.05)
    with pytest.raises(NoResultError, match=r"vanishes: run .* succeeded, but its log holds no result"):
        submitted.result(poll_interval=0.05, sleep=slept.append)
    # A log store may be late, so the log was read four times.
    assert slept == [2.0] * 3


def looks_around(secret: str) -> Any:
    import os
    import pathlib
    import subprocess

    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    files = pathlib.Path("~/.dstack/function").expanduser()
    return {
        "listed": secret in listed,
        "environment": any(secret in value for value in os.environ.values()),
        "files": sorted(path.name for path in files.iterdir()),
    }


def test_arguments_are_in_the_files_alone(call: Call, client: Client, server: LocalServer) -> None:
    name = f"secret-{os.urandom(4).hex()}"
    found = call(looks_around, "swordfish-4711", run_name=name)
    assert found == {
        "listed": False,
        "environment": False,
        "files": [".dstackignore", "main.py", "source"],
    }
    # The whole run, as any member of the project may see it.
    reply = requests.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        json={"run_name": name},
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=10,
    )
    assert name in reply.text
    assert "swordfish-4711" not in reply.text
    assert "looks_around" not in reply.text


def where() -> Any:
    import os

    return [os.environ["ONE"], os.environ["DSTACK_NODE_RANK"], os.environ["DSTACK_NODES_NUM"]]


def test_a_configuration_is_added_to(call: Call, tmp_path: Path) -> None:
    (tmp_path / "gpu.dstack.yml").write_text("type: task\nenv: [ONE=first]\ncommands: [echo prepared]\n")
    lines: list[str] = []
    assert call(where, configuration=tmp_path / "gpu.dstack.yml", on_log=lines.append)[0] == "first"
    assert lines == ["prepared"]
    assert call(where, configuration=Task(commands=[]), env={"ONE": "1"}) == ["1", "0", "1"]


def test_the_first_node_returns(call: Call) -> None:
    assert call(where, nodes=2, env={"ONE": "1"}) == ["1", "0", "2"]


def fails_on_the_second_node() -> Any:
    import os

    if os.environ["DSTACK_NODE_RANK"] == "1":
        raise ValueError("the second node")
    return 1


def test_an_error_of_another_node_counts(call: Call) -> None:
    with pytest.raises(RemoteFunctionError, match="the second node"):
        call(fails_on_the_second_node, nodes=2)


_TORCHRUN = """
import argparse, os, subprocess, sys
parser = argparse.ArgumentParser()
for name in ("nnodes", "node-rank", "nproc-per-node", "master-addr", "master-port"):
    parser.add_argument("--" + name)
parser.add_argument("script", nargs=argparse.REMAINDER)
given = parser.parse_args()
count = int(given.nproc_per_node)
children = []
for local in range(count):
    rank = int(given.node_rank) * count + local
    size = int(given.nnodes) * count
    environ = dict(os.environ, LOCAL_RANK=str(local), RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR=given.master_addr)
    children.append(subprocess.Popen([sys.executable, *given.script], env=environ))
sys.exit(max(child.wait() for child in children))
"""


def distributed() -> Any:
    import os
    import pathlib

    rank = os.environ["RANK"]
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}")
    own = pathlib.Path(f"~/.dstack/function/call-{os.environ['LOCAL_RANK']}.json").expanduser()
    return [rank, os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"], own.exists()]


def test_torchrun_calls_it_once_a_gpu_and_rank_0_returns(call: Call, tmp_path: Path) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    for name in ("torch/__init__.py", "torch/distributed/__init__.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "torch" / "distributed" / "run.py").write_text(_TORCHRUN)
    lines: list[str] = []
    value = call(
        distributed,
        torchrun=True,
        nodes=2,
        resources={"gpu": 2},
        env={"PYTHONPATH": str(tmp_path)},
        on_log=lines.append,
    )
    assert value == ["0", "4", "127.0.0.1", False]
    assert sorted(lines) == [f"rank {rank} of 4" for rank in range(4)]


def test_torchrun_without_torch_reports_it(call: Call) -> None:
    with pytest.raises(UnusableFunctionError, match="expected the package torch in the run, got none"):
        call(distributed, torchrun=True)


def uses_a_project() -> Any:
    from shapes.area import square  # type: ignore[import-not-found]

    return square(5)


def test_modules_of_the_project_are_there(call: Call, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "__init__.py").write_text("")
    (tmp_path / "shapes" / "area.py").write_text("def square(side): return side * side\n")
    assert call(uses_a_project, modules=[tmp_path / "shapes"]) == 25
    with pytest.raises(RemoteFunctionError, match="No module named 'shapes'"):
        call(uses_a_project)


def wheel(folder: Path, version: str, value: int) -> Path:
    """Return a wheel of the package ``wanted_thing``."""
    name = f"wanted_thing-{version}"
    path = folder / f"{name}-py3-none-any.whl"
    info = f"{name}.dist-info"
    files = {
        "wanted_thing.py": f"VALUE = {value}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: wanted_thing\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{each},,\n" for each in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(each, text)
    return path


def uses_a_package() -> Any:
    import wanted_thing  # type: ignore[import-not-found]

    return wanted_thing.VALUE


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_requirements_are_installed_once(call: Call, tmp_path: Path, installer: str) -> None:
    uv = Path(__file__).parent.parent.parent / ".venv" / "uv" / "bin" / "uv"
    uv = Path(os.environ.get("DSTACK_TEST_UV", uv))
    assert uv.exists(), "make installs it"
    commands = [f"export PATH={uv.parent}:$PATH"] if installer == "uv" else []
    cache = tmp_path / "cache"
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "1.0", 41)
    wheel(folder, "2.0", 42)
    ways: list[Any] = [
        (["wanted_thing==1.0", "--no-index", f"--find-links {folder}"], 41),
        ([str(folder / "wanted_thing-2.0-py3-none-any.whl"), "--no-index"], 42),
    ]
    for number, (requirements, value) in enumerate(ways, 1):
        for start in ("first", "second"):
            lines: list[str] = []
            found = call(
                uses_a_package,
                requirements=requirements,
                cache_dir=str(cache),
                commands=commands,
                env={"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1", "UV_OFFLINE": "1"},
                on_log=lines.append,
            )
            assert found == value
            assert any("The requirements are in" in line for line in lines) is (start == "second"), lines
            assert len(list(cache.iterdir())) == number


def test_requirements_that_cannot_be_installed_are_an_error(call: Call) -> None:
    with pytest.raises(
        RemoteFunctionError, match=r"was not called in run .* could not be installed"
    ) as caught:
        call(uses_a_package, requirements=["wanted_thing==9", "--no-index"])
    assert caught.value.type_name == "RequirementsError"
    assert caught.value.text.startswith("requirements: pip ended with exit status 1")


@pytest.fixture
def pickled(tmp_path: Path) -> dict[str, Any]:
    """Return the options of a run that has cloudpickle and this Python."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    return {"serializer": "cloudpickle", "commands": OWN_PYTHON, "env": env}


class Model:
    """A model."""

    def __init__(self, weight: int) -> None:
        self.weight = weight

    def fit(self, more: int) -> Model:
        return Model(self.weight + more + FACTOR)


def test_cloudpickle_takes_what_the_function_refers_to(call: Call, pickled: dict[str, Any]) -> None:
    assert call(lambda pair: (type(pair), pair[0] + FACTOR), (2, 3), **pickled) == (tuple, 42)
    value = call(Model(1).fit, 1, **pickled)
    assert value.weight == 42
    with pytest.raises(UnusableFunctionError, match="the result: expected what can be pickled"):
        call(lambda: (each for each in [1]), **pickled)
    with pytest.raises(RemoteFunctionError, match="ZeroDivisionError"):
        call(lambda: 1 / 0, **pickled)


def test_a_function_of_the_project_travels_with_its_package(
    call: Call, tmp_path: Path, pickled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "projected.py").write_text("RATE = 7\ndef train(x):\n    return RATE * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import projected  # type: ignore[import-not-found]

    assert call(projected.train, 6, modules=[projected], **pickled) == 42
    assert call(projected.train, 6, **pickled) == 42


def waits() -> None:
    import time

    print("started", flush=True)
    time.sleep(600)


def test_an_error_while_waiting_stops_the_run(call: Call, client: Client) -> None:
    for error in (KeyboardInterrupt, ValueError):
        name = f"waits-{os.urandom(4).hex()}"

        def on_log(line: str, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            call(waits, run_name=name, on_log=on_log)
        assert ended(client, name) == "terminated"


def ended(client: Client, name: str) -> str:
    """Return the status in which the run of that name ended."""
    run = client.runs.get(name)
    assert run is not None
    return str(run.wait(20, poll_interval=0.05).status)


class Interrupting:
    """A transport that is interrupted once the server has got the run."""

    def __init__(self, transport: Any, reached: Any = None) -> None:
        self.transport = transport
        self.reached = reached

    def __call__(self, request: Any) -> Any:
        reply = self.transport(request)
        if request.path.endswith("runs/apply"):
            raise KeyboardInterrupt
        return reply


class InterruptingAsync(Interrupting):
    """Its async twin, which waits to be cancelled."""

    async def __call__(self, request: Any) -> Any:
        reply = await self.transport(request)
        if request.path.endswith("runs/apply"):
            self.reached.set()
            await asyncio.sleep(600)
        return reply


@pytest.mark.parametrize("run_name", ["chosen", None])
def test_an_interrupt_while_submitting_stops_the_run(
    client: Client, run_name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    name = None if run_name is None else f"chosen-{os.urandom(4).hex()}"
    functions = FunctionCollection(client._operations, Interrupting(client._transport))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        functions.run(waits, run_name=name)
    (line,) = [record.getMessage() for record in caplog.records if "Stopping run" in record.getMessage()]
    assert ended(client, line.split()[2].rstrip(",")) == "terminated"


class Before(Interrupting):
    """A transport that is interrupted before the server gets the run."""

    def __call__(self, request: Any) -> Any:
        if request.path.endswith("get_archive_by_hash"):
            raise KeyboardInterrupt
        return self.transport(request)


def test_an_interrupt_before_the_submission_has_nothing_to_stop(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    functions = FunctionCollection(client._operations, Before(client._transport))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        functions.run(waits)
    assert "Stopping" not in caplog.text


class Twice(Interrupting):
    """A transport that is interrupted once the server has got the run, and again by its stop."""

    def __call__(self, request: Any) -> Any:
        if request.path.endswith("runs/stop"):
            raise KeyboardInterrupt
        return super().__call__(request)


def test_a_second_interrupt_names_the_run_that_may_keep_running(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    functions = FunctionCollection(client._operations, Twice(client._transport))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        functions.run(waits)
    last = caplog.records[-1].getMessage()
    assert "may keep running: its stop was interrupted" in last
    run = client.runs.get(last.split()[1])
    assert run is not None
    run.stop(abort=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"poll_interval": 0}, "poll_interval: expected more than 0 seconds"),
        ({"on_log": 5}, "on_log: expected a function"),
        ({"on_event": 3}, "on_event: expected a function"),
        ({"commands": [5]}, "commands: expected a list of strings"),
        ({"nodes": "2"}, "nodes: expected a whole number"),
    ],
)
def test_wrong_options_submit_nothing(server: LocalServer, client: Client, options: Any, text: str) -> None:
    before = len(server.requests)
    with pytest.raises(ConfigurationError, match=text):
        client.functions.run(returns, 1, **options)
    assert [request.path for request in server.requests[before:] if "apply" in request.path] == []


def test_a_cancellation_stops_the_run(server: LocalServer, client: Client) -> None:
    names = [f"cancelled-{os.urandom(4).hex()}" for _ in range(2)]

    async def main() -> None:
        target: Any = {"server_url": server.url, "project_name": server.project, "user_token": server.token}
        async with AsyncClient(**target) as own:
            reached = asyncio.Event()
            transport: Any = InterruptingAsync(own._transport, reached)
            submitting = AsyncFunctionCollection(own._operations, transport)
            task = asyncio.create_task(submitting.run(waits, run_name=names[0]))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            started = asyncio.Event()
            task = asyncio.create_task(
                own.functions.run(
                    waits, run_name=names[1], poll_interval=0.05, on_log=lambda line: started.set()
                )
            )
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert [ended(client, name) for name in names] == ["terminated"] * 2


def test_a_run_of_another_owner_is_left_alone(call: Call, client: Client) -> None:
    name = f"taken-{os.urandom(4).hex()}"
    run = client.runs.submit({"type": "task", "commands": ["sleep 600"]}, name)
    with pytest.raises(RunNameTakenError):
        call(returns, 1, run_name=name)
    assert run.status().is_active
    assert not run.last_status.is_stopping
    run.stop(abort=True)


def test_a_submitted_function_is_waited_for_and_stopped(client: Client) -> None:
    submitted = client.functions.submit(waits)
    assert submitted.name == "waits"
    assert "FunctionRun(name='waits', run=Run(" in repr(submitted)
    with pytest.raises(WaitTimeoutError):
        submitted.result(0.2, poll_interval=0.05)
    assert submitted.run.status().is_active
    submitted.stop(abort=True)
    with pytest.raises(RunStoppedError):
        submitted.result(20, poll_interval=0.05)


def test_an_async_one_likewise(server: LocalServer) -> None:
    async def main() -> Any:
        target: Any = {"server_url": server.url, "project_name": server.project, "user_token": server.token}
        async with AsyncClient(**target) as own:
            one, other = [await own.functions.submit(returns, each) for each in (1, 2)]
            values = await asyncio.gather(one.result(poll_interval=0.05), other.result(poll_interval=0.05))
            stopped = await own.functions.submit(waits)
            await stopped.stop(abort=True)
            with pytest.raises(RunStoppedError):
                await stopped.result(20, poll_interval=0.05)
            return values

    assert asyncio.run(main()) == [1, 2]


def test_a_marker_finds_the_call_of_an_earlier_process(client: Client) -> None:
    name = f"kept-{os.urandom(4).hex()}"
    assert client.functions.run(returns, 1, run_name=name, marker="mine:1", poll_interval=0.05) == 1
    assert client.functions.run(returns, 2, run_name=name, marker="mine:1", poll_interval=0.05) == 1
    run = client.runs.get(name)
    assert run is not None
    read = FunctionRun(FunctionCall.for_reading("returns"), report_key("mine:1"), run)
    assert read.result() == 1


def test_what_is_wrong_is_reported_before_anything_is_submitted(call: Call, client: Client) -> None:
    before = len(client.runs.list(all=True))
    wrong: list[Any] = [
        (lambda: 1, {}),
        (functools.partial(returns, object()), {}),
        (functools.partial(returns, 1), {"configuration": {"type": "service", "port": 80}}),
        (functools.partial(returns, 1), {"image": "a", "python": "3.12"}),
    ]
    for function, options in wrong:
        with pytest.raises(ConfigurationError):
            call(function, **options)
    assert len(client.runs.list(all=True)) == before


def fails_once(path: str) -> str:
    import pathlib

    seen = pathlib.Path(path)
    if not seen.exists():
        seen.write_text("")
        raise ValueError("the first attempt")
    return "the second attempt"


def test_the_newest_attempt_counts(call: Call, tmp_path: Path) -> None:
    retry = {"on_events": ["error"], "duration": "1h"}
    assert call(fails_once, str(tmp_path / "seen"), retry_policy=retry) == "the second attempt"


def test_a_shared_client_calls_many(server: LocalServer) -> None:
    async def main() -> Any:
        target: Any = {"server_url": server.url, "project_name": server.project, "user_token": server.token}
        async with SharedAsyncClient(**target) as own:
            calls = [own.functions.run(returns, each, poll_interval=0.1) for each in range(4)]
            return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [0, 1, 2, 3]
