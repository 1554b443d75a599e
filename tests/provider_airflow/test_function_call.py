"""What travels with a ``@task.dstack`` function, and what its run may end with beside a value."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_dstack import operators
from airflow_provider_dstack._compat import AirflowFailException, AirflowSkipException
from airflow_provider_dstack._function_call import _plain, local_modules, local_requirements
from airflow_provider_dstack._previous_try import RECORD_KEY
from airflow_provider_dstack.decorators import DEFAULT_MAX_RESULT_BYTES, DstackDecoratedOperator, dstack_task
from airflow_provider_dstack.errors import DstackError, DstackRunFailed, DstackRunInterrupted
from dstack_core import ReportLimits, ServerUnreachableError
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, over, paths, runs_of
from tests.provider_airflow.tries import Store, Tries, record_of
from tests.provider_airflow.versions import DagSerialization

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


def wheel(folder: Path) -> Path:
    """Return a wheel of the package ``wanted_thing``."""
    path = folder / "wanted_thing-1.0-py3-none-any.whl"
    info = "wanted_thing-1.0.dist-info"
    files = {
        "wanted_thing.py": "VALUE = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: wanted_thing\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": "".join(f"{name},,\n" for name in files)}.items():
            archive.writestr(name, text)
    return path


def test_requirements_and_modules_beside_the_dag_travel(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wheel(dag_runner.folder)
    (dag_runner.folder / "shapes").mkdir()
    (dag_runner.folder / "shapes" / "__init__.py").write_text("def square(side): return side * side\n")
    ran = dag_runner.run_tasks(
        f"""
@task
def sides():
    return [2, 3]

@task.dstack(
    requirements=["wanted_thing-1.0-py3-none-any.whl", "--no-index"],
    modules=["shapes"],
    cache_dir="{tmp_path}/{{{{ task.task_id }}}}",
    poll_interval=0.3,
)
def train(side):
    import wanted_thing
    from shapes import square
    return wanted_thing.VALUE + square(side)

@task
def total(values):
    return sum(values)

total(train.expand(side=sides()))
"""
    )
    output = capfd.readouterr().out
    assert ran.values["total"] == 42 + 4 + 42 + 9, output
    assert len(list((tmp_path / "train").iterdir())) == 1
    assert output.count("The requirements are in") + output.count("Installed the requirements") == 2


def test_requirements_that_cannot_be_installed_fail_the_task_with_the_installers_last_lines(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    (dag_runner.folder / "requirements.txt").write_text("wanted_thing==9\n--no-index\n")
    ran = dag_runner.run_tasks(
        "@task.dstack(requirements='requirements.txt', poll_interval=0.3)\ndef train(): ...\ntrain()"
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "DstackRunFailed" in output
    assert "No matching distribution found for wanted_thing==9" in output


def test_an_imported_module_travels_and_the_dag_can_be_copied_and_stored(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "__init__.py").write_text("")
    (tmp_path / "shapes" / "area.py").write_text("def square(side): return side * side\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    area = importlib.import_module("shapes.area")
    with DAG("modules", schedule=None) as dag:

        @dstack_task(modules=[area], poll_interval=0.3)
        def train(side: int) -> int:
            from shapes.area import square  # type: ignore[import-not-found]

            return square(side)  # type: ignore[no-any-return]

        result: Any = train(3)
        train.expand(side=[4])
    assert copy.deepcopy(result.operator).modules == [str(tmp_path / "shapes")]
    stored = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    assert set(stored.task_ids) == {"train", "train__1"}
    assert result.operator.execute(Tries(server, None).context) == 9


def test_torchrun_starts_the_function(server: LocalServer, tmp_path: Path) -> None:
    program = f"#!/bin/sh\nRANK=0 LOCAL_RANK=0 WORLD_SIZE=4 exec {sys.executable} {{}} --worker\n"
    (tmp_path / "torchrun").write_text(program.format("$HOME/.dstack/function/main.py"))
    (tmp_path / "torchrun").chmod(0o755)
    tried = Decorated(server, None, torchrun=True, commands=[f"export PATH={tmp_path}:$PATH"])

    def train() -> str:
        import os

        return os.environ["WORLD_SIZE"]

    assert tried.call(train) == "4"


@MODES
def test_an_async_function_runs(dag_runner: DagRunner, server: LocalServer, deferrable: bool) -> None:
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(poll_interval=0.3, deferrable={deferrable})
async def train(value):
    import asyncio
    await asyncio.sleep({2.5 if deferrable else 0})
    return value

train(7)
"""
    )
    assert ran.values["train"] == 7


@MODES
@pytest.mark.parametrize("get_logs", [True, False], ids=["with-logs", "without-logs"])
def test_a_function_that_skips_skips_the_task(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    deferrable: bool,
    get_logs: bool,
) -> None:
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(poll_interval=0.3, deferrable={deferrable}, get_logs={get_logs}, retries=2)
def train():
    import dstack_report, time
    time.sleep({2.5 if deferrable else 0})
    dstack_report.skip("no new rows")

train()
"""
    )
    assert ran.tasks == {"train": "skipped"}
    assert "asks to skip the task: no new rows" in capfd.readouterr().out


@pytest.mark.parametrize(("listed", "state"), [(99, "skipped"), (98, "failed")])
def test_an_exit_status_can_skip_the_task(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    listed: int,
    state: str,
) -> None:
    ran = dag_runner.run_tasks(
        f"@task.dstack(poll_interval=0.3, skip_on_exit_code={listed}, debug_on_failure='10m')\n"
        "def train():\n    import sys\n    sys.exit(99)\ntrain()"
    )
    output = capfd.readouterr().out
    assert ran.tasks == {"train": state}
    assert ("exited with status 99, which means to skip" in output) is (state == "skipped")
    assert ("DstackUserError" in output) is (state == "failed")
    assert ("container is held" in output) is (state == "failed")


@pytest.mark.parametrize("serializer", ["json", "cloudpickle"])
def test_keys_of_the_context_that_json_can_carry_are_filled(
    dag_runner: DagRunner, server: LocalServer, serializer: str
) -> None:
    own_python = f"['export PATH={Path(sys.executable).parent}:$PATH']"
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(serializer={serializer!r}, commands={own_python}, params={{"rate": 3}}, poll_interval=0.3)
def train(value, run_id, params, ds=None):
    return [value, run_id, params, type(params).__name__, len(ds)]

train(1)
"""
    )
    value, run_id, params, kind, length = ran.values["train"]
    assert (value, params, kind, length) == (1, {"rate": 3}, "dict", 10)
    assert run_id.startswith("manual__")


def test_a_value_of_the_context_is_made_plain_or_refused() -> None:
    assert _plain({"a": (1, None, "b")}) == {"a": [1, None, "b"]}
    for value in (object(), {1: "a"}, b"bytes", [object()]):
        with pytest.raises(TypeError, match="expected a value that JSON can carry, got"):
            _plain(value)


@MODES
def test_a_large_result_comes_back_without_a_warning(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ran = dag_runner.run_tasks(
        f"""
@task.dstack(poll_interval=0.3, deferrable={deferrable}, max_result_bytes=2_000_000)
def train():
    import time
    time.sleep({2.5 if deferrable else 0})
    return "x" * 1_999_000

@task
def size(value):
    return len(value)

size(train())
"""
    )
    output = capfd.readouterr().out
    assert ran.values["size"] == 1_999_000, output[-3000:]
    assert "too large" not in output


def test_the_default_limit_is_that_of_the_core() -> None:
    assert ReportLimits().max_bytes == DEFAULT_MAX_RESULT_BYTES


def test_a_server_without_files_is_named_and_not_asked_again(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults.add(path="server/get_info", status=200, body={"server_version": "0.19.16"}, times=100)
    ran = dag_runner.run_tasks("@task.dstack(poll_interval=0.3, retries=2)\ndef train(): ...\ntrain()")
    output = capfd.readouterr().out
    assert ran.tasks == {"train": "failed"}
    assert "AirflowFailException" in output
    assert "files: needs dstack >= 0.19.17" in output
    assert paths(server, "/runs/apply") == []


def test_paths_are_beside_the_dag() -> None:
    def beside(path: Any) -> Path:
        return Path("/dags", path)

    assert local_modules("shapes", beside) == [Path("/dags/shapes")]
    package = Path(json.__file__).parent
    assert local_modules(json.decoder, beside) == [package]
    assert local_modules([json, Path("a"), "/b"], beside) == [package, Path("/dags/a"), Path("/b")]
    assert local_modules([copy, sys], beside) == [Path(copy.__file__), sys]
    assert local_requirements("r.txt", beside) == Path("/dags/r.txt")
    lines = ["torch==2.9", "a/b.whl", "https://host/b.whl"]
    assert local_requirements(lines, beside) == ["torch==2.9", "/dags/a/b.whl", "https://host/b.whl"]
    assert local_requirements(None, beside) == ()


class Decorated(Tries):
    """One task instance of ``@task.dstack`` over its tries."""

    def call(self, function: Any, *args: Any, **arguments: Any) -> Any:
        return self.decorated(function, *args, **arguments).execute(self.context)

    def decorated(self, function: Any, *args: Any, **arguments: Any) -> DstackDecoratedOperator:
        return DstackDecoratedOperator(
            task_id="train", python_callable=function, op_args=args, **{**self.arguments, **arguments}
        )


def double(value: int) -> int:
    return value * 2


def test_cloudpickle_can_be_forbidden(server: LocalServer) -> None:
    tried = Decorated(server, None, serializer="cloudpickle", allow_cloudpickle=False)
    with pytest.raises(AirflowFailException, match="which is forbidden here: allow_cloudpickle is False"):
        tried.call(double, 1)
    assert paths(server, "/runs/apply") == []


class Lost(Exception):
    """The loss of a worker."""


@pytest.mark.parametrize("store", [Store(), None], ids=["store", "names alone"])
def test_a_retry_reads_the_value_of_the_run_it_takes_over(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, store: Store | None
) -> None:
    tried = Decorated(server, store, on_kill_action="keep")

    def lose(*args: Any) -> None:
        raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(DstackDecoratedOperator, "announce", lose)
        with pytest.raises(Lost):
            tried.call(double, 21)
    (run,) = tried.runs()
    over(run)
    tried.next_try()
    assert tried.call(double, 1) == 42
    assert len(tried.runs()) == 1


@pytest.mark.parametrize("tries", [2, 3])
def test_a_retry_that_submits_the_earlier_run_once_more_reads_its_value(
    server: LocalServer, tries: int
) -> None:
    store = Store()
    tried = Decorated(server, store)
    # The first worker was lost before the server had its run.
    store.set(RECORD_KEY, record_of(tried))
    for _ in range(tries - 1):
        tried.next_try()
    assert tried.call(double, 21) == 42
    (run,) = tried.runs()
    assert "/1of3#" in (run.marker or "")


def test_a_log_without_the_result_is_an_error(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._function.result._PAUSES", (0.01,))
    # One to submit with, another one to read with.
    keys = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(DstackDecoratedOperator, "_key", lambda self, context: next(keys))
    with pytest.raises(DstackError, match="succeeded, but its log holds no result"):
        Decorated(server, None).call(double, 1)


def fail() -> None:
    raise KeyError("no such weight")


def test_a_log_that_cannot_be_read_leaves_the_error_of_the_run(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ServerUnreachableError("no reply")

    monkeypatch.setattr("dstack_core.FunctionRun.result", unreachable)
    tried = Decorated(server, None)
    with pytest.raises(DstackRunFailed, match="exited with status 1"):
        tried.call(fail)
    tried.next_try()
    with pytest.raises(DstackError, match="no reply"):
        tried.call(double, 1, durable=False)


def test_a_kill_ends_the_wait_for_the_result(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any, *, sleep: Any, **kwargs: Any) -> Any:
        operator._killed = True
        sleep(60)

    monkeypatch.setattr("dstack_core.FunctionRun.result", killed)
    tried = Decorated(server, None)
    operator = tried.decorated(double, 1)
    with pytest.raises(DstackRunInterrupted, match="before the result of run d-train-"):
        operator.execute(tried.context)


def skips() -> None:
    import dstack_report

    dstack_report.skip("open-sesame")


@pytest.mark.parametrize("function", [fail, skips])
def test_secrets_are_masked_in_what_a_function_ends_with(server: LocalServer, function: Any) -> None:
    env = {"WORD_TOKEN": "open-sesame", "WEIGHT_KEY": "no such weight"}
    tried = Decorated(server, None, env=env, get_logs=False)
    with pytest.raises((DstackRunFailed, AirflowSkipException)) as caught:
        tried.call(function)
    assert "***" in str(caught.value)
    assert not any(word in str(caught.value) for word in env.values())


def test_nothing_is_left_behind(server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tried = Decorated(server, None)
    assert tried.call(double, 1) == 2
    tried.next_try()
    with pytest.raises(AirflowFailException, match="argument 1: expected a value that JSON can carry"):
        tried.call(double, object())
    assert list(tmp_path.iterdir()) == []
    assert len(runs_of(server, "airflow:")) == 1
