"""``dstack_task``: a function is a Prefect task, its body runs in a run, and its value comes back."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import zipfile
from pathlib import Path
from typing import Any
from uuid import UUID

import cloudpickle  # type: ignore[import-untyped]
import pytest
from prefect import Task, flow, get_client
from prefect.cache_policies import INPUTS, TASK_SOURCE
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import TaskOptions, task_input_hash
from pydantic import SecretStr

from dstack_core import (
    ConfigurationError,
    NoResultError,
    RemoteFunctionError,
    RunFailedError,
    RunUserError,
    UnusableFunctionError,
)
from dstack_core.integration import FunctionCall
from dstack_core.integration import mask_value as masked
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _cancellation, dstack_task, functions
from prefect_dstack._function_options import FunctionTaskOptions

from .support import (
    all_runs,
    artifacts_of,
    cancelled_when,
    interrupt_when_asked,
    is_running,
    log_records,
    outcome_of,
    submissions,
    the_run,
    until,
)

pytestmark = pytest.mark.usefixtures("prefect_server")

FAST: dict[str, Any] = {"poll_interval": 0.1}
FACTOR = 40
SERVICE = {"type": "service", "commands": ["true"], "port": 80}
# The Python of the tests; the embedded server's runs find another one first.
OWN_PYTHON = [f"export PATH={Path(sys.executable).parent}:$PATH"]


def train(rate: float, words: list[str] | None = None, *, day: str = "") -> dict[str, Any]:
    """Train a model."""
    import os

    print(f"training on {day}")
    return {"rate": rate * int(os.environ.get("FACTOR", "1")), "words": words, "day": day}


async def atrain(rate: float) -> float:
    import asyncio

    await asyncio.sleep(0)
    return rate * 2


def task_runs(flow_run_id: Any) -> list[TaskRun]:
    """Return the task runs of a flow run."""

    async def read() -> list[TaskRun]:
        async with get_client() as client:
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            return list(await client.read_task_runs(flow_run_filter=chosen))

    return asyncio.run(read())


def test_a_call_in_a_flow_returns_the_value(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, env={"FACTOR": "3"}, tags=["gpu"], **FAST)(train)

    @flow
    def calling() -> tuple[Any, ...]:
        return flow_run.id, remote(0.5, ["a", "\u00fc"], day="monday"), remote.submit(1).result()

    flow_run_id, called, submitted = calling()
    assert called == {"rate": 1.5, "words": ["a", "\u00fc"], "day": "monday"}
    assert submitted == {"rate": 3, "words": None, "day": ""}
    runs = all_runs(dstack)
    assert [run.name.startswith("calling-train-") for run in runs] == [True, True]
    assert all((run.marker or "").startswith(f"prefect:flow_run/{flow_run_id}/stop/") for run in runs)
    records = log_records(flow_run_id, last=f"Run {runs[1].name} finished")
    assert sum("training on monday" in record for record in records) == 1
    assert not any("::dstack" in record for record in records)
    assert {f"dstack-train-{kind}" for kind in ("page", "progress")} <= set(artifacts_of(flow_run_id))

    def started() -> list[TaskRun]:
        found = task_runs(flow_run_id)
        return found if len(found) == 2 else []

    found = until(started)
    assert all(run.name.startswith("train-") and run.tags == ["gpu"] for run in found)


def test_the_task_is_one_of_prefect(credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, retries=2, name="Train", **FAST)(train)
    assert type(remote) is Task
    assert (remote.name, remote.retries, remote.description) == ("Train", 2, "Train a model.")
    assert inspect.signature(remote.fn) == inspect.signature(train)
    changed = remote.with_options(retries=5, name="Other")
    assert (changed.retries, changed.name, changed.task_key) == (5, "Other", remote.task_key)
    assert dstack_task(train).name == "train"
    assert not remote.isasync
    assert dstack_task(atrain).isasync


def test_mapped_calls_are_runs_of_their_own(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, **FAST)(train)
    pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=4)

    @flow(task_runner=pool)  # type: ignore[arg-type]
    def mapping() -> list[Any]:
        return [each["rate"] for each in remote.map([1, 2, 3, 4], day="monday").result()]

    assert mapping() == [1, 2, 3, 4]
    assert len({run.name for run in all_runs(dstack)}) == 4


def test_an_async_function_is_awaited(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, **FAST)(atrain)

    @flow
    async def awaiting() -> Any:
        both = await asyncio.gather(remote(1), remote(2))
        return [*both, remote.with_options(name="third").submit(3).result()]

    assert asyncio.run(awaiting()) == [2, 4, 6]

    @flow
    def submitting() -> Any:
        return remote.submit(4).result()

    assert submitting() == 8
    assert len(all_runs(dstack)) == 4


def leaks(token: str) -> None:
    import os

    print(os.environ["TOKEN"])
    raise ValueError(f"refused: {os.environ['TOKEN']} {token}")


async def aleaks(token: str) -> None:
    import os

    raise ValueError(f"refused: {os.environ['TOKEN']} {token}")


@pytest.mark.parametrize("function", [leaks, aleaks])
def test_an_exception_comes_back_without_secrets(
    function: Any, dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    env = {"TOKEN": SecretStr("swordfish-4711")}
    remote = dstack_task(credentials=credentials, env=env, **FAST)(function)

    @flow
    def failing() -> tuple[Any, Any]:
        state = remote.submit("argument", return_state=True)
        return flow_run.id, state

    flow_run_id, state = failing()
    with pytest.raises(RemoteFunctionError, match="raised an exception in run") as caught:
        state.result()
    error = caught.value
    assert (error.type_name, error.text) == ("ValueError", "refused: *** argument")
    assert "line " in "".join(error.traceback)
    assert error.outcome.exit_status == 1
    records = log_records(flow_run_id, last="Finished in state Failed")
    assert any("refused: *** argument" in record for record in records)
    run = until(lambda: [run for run in task_runs(flow_run_id) if run.state and run.state.is_failed()])[0]
    assert run.state is not None
    for text in (repr(error.__dict__), state.message, run.state.message, caplog.text, *records):
        assert "swordfish" not in (text or "")


def returns_secrets() -> Any:
    import os

    return [{"token": f"the {os.environ['TOKEN']}", "others": [1, None, "x"]}]


def test_a_secret_in_a_value_is_replaced_with_a_warning(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    remote = dstack_task(credentials=credentials, env={"TOKEN": SecretStr("swordfish-4711")}, **FAST)(
        returns_secrets
    )

    @flow
    def leaking() -> Any:
        return remote()

    assert leaking() == [{"token": "the ***", "others": [1, None, "x"]}]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("they are replaced by ***" in message for message in warnings) == 1


def test_values_without_secrets_are_the_same_objects() -> None:
    def mask(text: str) -> str:
        return text.replace("secret", "***")

    plain = {"a": [1, ("b", None)], 2: "c"}
    assert masked(plain, mask) is plain
    assert masked({"a": [("secret", 1)], "secret": object}, mask) == {"a": [("***", 1)], "***": object}


def fails_once(folder: str) -> str:
    import pathlib

    seen = pathlib.Path(folder) / "seen"
    if not seen.exists():
        seen.touch()
        raise OSError("the first try")
    return "second"


def test_each_try_is_a_run_of_its_own(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    remote = dstack_task(credentials=credentials, retries=1, retry_delay_seconds=0, **FAST)(fails_once)

    @flow
    def retrying() -> Any:
        return remote(str(tmp_path))

    assert retrying() == "second"
    first, second = all_runs(dstack)
    assert (first.raw_status, second.raw_status) == ("failed", "done")
    assert second.name == f"{first.name}-2"


def test_a_retried_flow_takes_over_the_values(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, **FAST)(train)
    values: list[Any] = []

    @flow(retries=1, retry_delay_seconds=0)
    def retrying() -> None:
        values.append([remote(1), remote(2), remote(1)])
        if len(values) == 1:
            raise RuntimeError("something else failed")

    retrying()
    assert values[0] == values[1]
    assert [value["rate"] for value in values[1]] == [1, 2, 1]
    # The call that is equal to the first one is cached or a run of its own, in both executions alike.
    assert len(all_runs(dstack)) in (2, 3)


def test_a_cached_value_needs_no_run(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "credentials": credentials,
        "cache_policy": (INPUTS + TASK_SOURCE).configure(key_storage=tmp_path / "keys"),
        **FAST,
    }
    remote, other = dstack_task(**options)(fails_never), dstack_task(**options)(fails_never_either)

    @flow(persist_result=True)
    def caching(value: int) -> Any:
        return remote(value), other(value)

    assert caching(1) == (1, 2)
    assert submissions(dstack) == 2
    assert caching(1) == (1, 2)
    assert submissions(dstack) == 2
    assert caching(2) == (2, 4)
    assert submissions(dstack) == 4


def fails_never(value: int) -> int:
    return value


def fails_never_either(value: int) -> int:
    return value * 2


def test_the_keys_of_a_task_are_made_of_the_function() -> None:
    def first() -> Any:
        def same(value: int) -> int:
            return value

        return dstack_task(cache_key_fn=task_input_hash)(same)

    def second() -> Any:
        def same(value: int) -> int:
            return value + 1

        return dstack_task(cache_key_fn=task_input_hash)(same)

    assert first().task_key == first().task_key
    assert first().task_key != second().task_key
    assert first().source_code != second().source_code
    assert "return value" in first().source_code


def waits() -> None:
    import time

    print("started", flush=True)
    time.sleep(600)


async def awaits() -> None:
    import asyncio

    print("started", flush=True)
    await asyncio.sleep(600)


@pytest.mark.parametrize("function", [waits, awaits])
def test_a_cancelled_flow_run_stops_the_run(
    function: Any, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    remote = dstack_task(credentials=credentials, retries=3, **FAST)(function)
    ids: list[UUID] = []
    states: list[Any] = []

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        future = remote.submit()
        future.wait()
        states.append(future.state)

    with cancelled_when(lambda: is_running(dstack), ids):
        cancelled(return_state=True)
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert states[0].is_cancelled()


def test_an_interrupt_stops_the_run(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, **FAST)(waits)

    @flow
    def interrupted() -> None:
        remote()

    thread = interrupt_when_asked(dstack)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread.join()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


def wheel(folder: Path) -> Path:
    """Return a wheel of the package ``wanted_thing``."""
    path, info = folder / "wanted_thing-1.0-py3-none-any.whl", "wanted_thing-1.0.dist-info"
    files = {
        "wanted_thing.py": "VALUE = 41\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: wanted_thing\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{each},,\n" for each in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(each, text)
    return path


def uses_packages(rate: int) -> int:
    import projected_rates  # type: ignore[import-not-found]
    import wanted_thing  # type: ignore[import-not-found]

    return int(wanted_thing.VALUE + projected_rates.RATE * rate)


def test_requirements_and_modules_travel(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    (tmp_path / "projected_rates.py").write_text("RATE = 7\n")
    remote = dstack_task(
        credentials=credentials,
        requirements=[str(wheel(tmp_path)), "--no-index"],
        modules=[tmp_path / "projected_rates.py"],
        cache_dir=str(tmp_path / "cache"),
        env={"PIP_NO_CACHE_DIR": "1"},
        **FAST,
    )(uses_packages)

    @flow
    def calling() -> Any:
        return remote(2)

    assert calling() == 55


def exits(status: int) -> None:
    import sys

    print("before the end")
    sys.exit(status)


def vanishes() -> None:
    import os

    os._exit(0)


def returns_a_set() -> Any:
    return {1}


def test_other_ends_have_their_errors(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_of(function: Any, *args: Any, **options: Any) -> Any:
        @flow
        def calling() -> Any:
            return dstack_task(credentials=credentials, **options, **FAST)(function)(*args)

        return calling(return_state=True)

    with pytest.raises(RunFailedError, match="exited with status 99") as caught:
        state_of(exits, 99).result()
    assert (type(caught.value), caught.value.outcome.exit_status) == (RunUserError, 99)
    assert state_of(exits, 0).result() is None
    with pytest.raises(UnusableFunctionError, match="expected a value that JSON can carry, got set"):
        state_of(returns_a_set).result()
    with pytest.raises(RunFailedError, match="exited with status 5"):
        state_of(train, 1, commands=["exit 5"]).result()
    with pytest.raises(ConfigurationError, match="argument 1: expected a value that JSON can carry, got set"):
        state_of(train, {1}).result()
    with pytest.raises(ConfigurationError, match="expected a task, got a service"):
        state_of(train, 1, configuration=SERVICE).result()
    # A log store may be late, so the log is read four times.
    pauses: list[float] = []
    monkeypatch.setattr("dstack_core._function.result._PAUSES", (0.1, 0.1, 0.1))
    monkeypatch.setattr(FunctionCall, "read", lambda *given: pauses.append(0))
    read = sum("/logs/poll" in request.path for request in dstack.requests)
    with pytest.raises(NoResultError, match=r"vanishes: run .* succeeded, but its log holds no result"):
        state_of(vanishes).result()
    assert sum("/logs/poll" in request.path for request in dstack.requests) - read >= 4
    assert not pauses


def skips() -> None:
    import dstack_report

    dstack_report.metric(loss=0.5)
    dstack_report.skip("nothing new")


def test_a_function_that_skips_returns_none(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, **FAST)(skips)

    @flow
    def skipping() -> tuple[Any, ...]:
        state = remote(return_state=True)
        return flow_run.id, state.type.value, state.result()

    flow_run_id, state, value = skipping()
    assert (state, value) == ("COMPLETED", None)
    assert any("nothing new" in record for record in log_records(flow_run_id, last="was skipped"))
    assert "nothing new" in str(artifacts_of(flow_run_id)["dstack-skips"].data)


def test_cloudpickle_takes_what_the_function_refers_to(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    more = 2

    def closed(pair: tuple[int, int]) -> Any:
        return (type(pair), sum(pair) + FACTOR + more)

    with pytest.raises(ConfigurationError, match="got a closure over more"):
        dstack_task(credentials=credentials)(closed)
    remote = dstack_task(
        credentials=credentials,
        serializer="cloudpickle",
        commands=OWN_PYTHON,
        env={"PYTHONPATH": str(tmp_path / "packages")},
        **FAST,
    )(closed)

    @flow
    def pickling() -> Any:
        return remote((1, 2))

    assert pickling() == (tuple, 45)
    monkeypatch.setenv("DSTACK_FORBID_CLOUDPICKLE", "1")
    with pytest.raises(ConfigurationError, match="DSTACK_FORBID_CLOUDPICKLE is set"):
        pickling()
    assert submissions(dstack) == 1


def test_a_python_that_cannot_unpickle_is_named(dstack: LocalServer, credentials: DstackCredentials) -> None:
    remote = dstack_task(credentials=credentials, serializer="cloudpickle", **FAST)(train)

    @flow
    def pickling() -> Any:
        return remote(1)

    with pytest.raises(UnusableFunctionError, match=r"(cloudpickle .* in the run|expected Python)"):
        pickling()


def generates() -> Any:
    yield 1


def uses_names_of_its_file() -> int:
    return FACTOR


@pytest.mark.parametrize(
    ("function", "options", "shown_text"),
    [
        (train, {"retrys": 3}, r"retrys: expected an option of dstack_task.* Did you mean retries\?"),
        (train, {"zzz": 3}, "zzz: expected an option .* Check the spelling"),
        (train, {"serializer": "yaml"}, "serializer: expected one of 'json', 'cloudpickle', got 'yaml'"),
        (train, {"max_result_bytes": 0}, "max_result_bytes: expected 1 byte or more, got 0"),
        (train, {"nodes": "many"}, "^nodes: expected a whole number, got 'many'"),
        (train, {"backends": "aws"}, "^backends: expected a list"),
        (train, {"env": {"A": None}}, "env: expected text as the value of A, got NoneType"),
        (train, {"poll_interval": 0}, "poll_interval: expected more than 0 seconds, got 0"),
        (train, {"log_budget_bytes": -1}, "log_budget_bytes: expected bytes of log"),
        (train, {"on_crash": "hope"}, 'on_crash: expected "stop" or "keep", got \'hope\''),
        (train, {"poll_interval": "x"}, "poll_interval: expected more than 0 seconds, got 'x'"),
        (train, {"retry_budget": True}, "retry_budget: expected 0 seconds or more, got True"),
        (train, {"stream_logs": "no"}, "stream_logs: expected True or False, got 'no'"),
        (train, {"log_timestamps": "yes"}, "log_timestamps: expected True or False, got 'yes'"),
        (train, {"artifacts": 1}, "artifacts: expected True or False, got 1"),
        (train, {"torchrun": "no"}, "torchrun: expected True or False, got 'no'"),
        (train, {"tags": {"a b": 1}}, "^tags: expected a key .* got 'a b'"),
        (train, {"tags": {"team": 1}}, "^tags: expected a value .* got 1"),
        (train, {"debug_on_failure": "soon"}, "^debug_on_failure: expected seconds .* got 'soon'"),
        (uses_names_of_its_file, {}, "got one that uses FACTOR of its file"),
        (lambda: 1, {}, "expected a plain function, got a lambda"),
        (generates, {}, "expected a function that returns its value, got a generator"),
        (print, {}, r"expected a function \(def or async def\), got builtin_function_or_method"),
        (3, {}, r"expected a function \(def or async def\), got int"),
    ],
)
def test_what_is_wrong_is_refused_where_it_is_decorated(
    function: Any, options: dict[str, Any], shown_text: str
) -> None:
    with pytest.raises(ConfigurationError, match=shown_text):
        dstack_task(**options)(function)


def add(one: int, two: int) -> int:
    return one + two


def test_a_run_is_named_after_its_task(dstack: LocalServer, credentials: DstackCredentials) -> None:
    named: Any = dstack_task(credentials=credentials, poll_interval=0.1, name="My Func (v2.0)")(add)

    @flow(name="nightly")
    def calls() -> list[int]:
        return [named(1, 2), named.with_options(name="Other one")(1, 2), named.with_options(name="add")(1, 2)]

    assert calls() == [3, 3, 3]
    with dstack.client() as client:
        names = {run.name.rpartition("-")[0] for run in client.runs.list(all=True)}
    assert names == {"nightly-my-func-v2-0", "nightly-other-one", "nightly-add"}


def test_the_options_are_those_of_prefect_and_of_a_submission() -> None:
    assert FunctionTaskOptions.__optional_keys__ >= TaskOptions.__optional_keys__
    # An option that has a name of Prefect's would never reach the run.
    own = set(inspect.signature(dstack_task).parameters)
    assert not own & FunctionTaskOptions.__optional_keys__
    assert inspect.signature(FunctionCall.pack).parameters["max_result_bytes"].default == (
        functions._MAX_RESULT_BYTES
    )


def test_a_process_of_another_task_runner_can_make_the_call(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """Dask, Ray and process pools pickle the task."""
    remote = cloudpickle.loads(cloudpickle.dumps(dstack_task(credentials=credentials, **FAST)(train)))

    @flow
    def calling() -> dict[str, Any]:
        return dict(remote.with_options(name="pickled").submit(2).result())

    assert calling()["rate"] == 2


def test_a_call_that_cannot_be_packed_submits_nothing(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    remote = dstack_task(credentials=credentials, requirements="no-such-file.txt", **FAST)(train)

    @flow
    def calling() -> Any:
        return remote(1)

    with pytest.raises(ConfigurationError, match="no-such-file"):
        calling()
    assert submissions(dstack) == 0
