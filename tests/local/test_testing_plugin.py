"""The pytest plugin, as the projects of its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from dstack_core import Client
from dstack_core.testing import DstackServer
from dstack_core.testing.server import environment
from tests.docs.blocks import ROOT
from tests.user_project import PLUGIN, run_tests, summary, write

SUBMIT = """\
from dstack_core import Client

def submit(command="echo trained", **more):
    with Client.from_config() as client:
        run = client.runs.submit({"type": "task", "name": "train", "commands": [command]}, **more)
        return run.name if command.startswith("sleep") else run.wait(poll_interval=0.2)
"""
SCOPES = """\
import os
import pytest
from train import submit

@pytest.mark.parametrize("number", [1, 2])
def test_function(dstack_server, number):
    assert os.environ["DSTACK_SERVER_URL"] == dstack_server.url
    assert dstack_server.token in os.environ["AIRFLOW_CONN_DSTACK_DEFAULT"]
    assert submit().succeeded
    assert len(dstack_server.runs) == 1

@pytest.mark.parametrize("number", [1, 2])
def test_module(dstack_server_module, dstack_scenario, number):
    assert len(dstack_server_module.runs) == number - 1
    dstack_scenario.fail_pull()
    assert submit().category == "image.pull_failed"
    dstack_scenario.fail_pull(times=9)

def test_session(dstack_server_session):
    assert submit().succeeded
    dstack_server_session.forget()
    assert dstack_server_session.runs == [] and dstack_server_session.requests() == 0

def test_own_server_beside_the_session_s(dstack_server_session, dstack_server):
    assert submit().succeeded
    assert len(dstack_server.runs) == 1
"""
AFTERWARDS = """\
import os

def test_environment_is_back():
    assert "DSTACK_SERVER_URL" not in os.environ
    assert "AIRFLOW_CONN_DSTACK_DEFAULT" not in os.environ
    assert os.environ["DSTACK_UI_URL"] == "http://before"
"""


def test_fixtures_of_each_scope_and_the_environment_afterwards(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": SUBMIT, "test_a.py": SCOPES, "test_b.py": AFTERWARDS})
    # Of the session's server the environment is restored only at the end.
    done = run_tests(
        tmp_path,
        "--deselect",
        "test_a.py::test_session",
        "-k",
        "not session_s",
        DSTACK_UI_URL="http://before",
    )
    assert summary(done) == "5 passed, 2 deselected", done.stdout
    done = run_tests(tmp_path, "-n", "2", "-k", "session", DSTACK_UI_URL="http://before")
    assert summary(done) == "2 passed", done.stdout + done.stderr


LEFT = {
    "train.py": SUBMIT,
    "test_b.py": "from train import submit\ndef test_left(dstack_server):\n    submit('sleep 1h')\n",
}


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("warn", "1 passed, 1 warning"),
        ("fail", "1 passed, 1 error"),
        ("ignore", "1 passed"),
        (None, "1 passed, 1 warning"),
    ],
)
def test_unfinished_runs_are_named(tmp_path: Path, setting: str | None, end: str) -> None:
    write(tmp_path, LEFT)
    done = run_tests(tmp_path, *([] if setting is None else ["-o", f"dstack_leftover={setting}"]))
    assert summary(done) == end, done.stdout
    text = "The test left 1 run(s) unfinished. Stop them, or wait for them:"
    assert (text in done.stdout) is (setting != "ignore")
    assert ("train: " in done.stdout) is (setting != "ignore")


def test_a_wrong_setting_is_one_error(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "-o", "dstack_leftover=sometimes")
    assert "dstack_leftover: expected one of warn, fail, ignore, got 'sometimes'." in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_plugin_its_fixtures_are_missing(tmp_path: Path) -> None:
    write(tmp_path, LEFT)
    done = run_tests(tmp_path, plugin=("-p", "no:dstack"))
    assert "fixture 'dstack_server' not found" in done.stdout


def test_loading_the_plugin_imports_only_pytest() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import dstack_core.testing.plugin; "
        "print(*sorted(name for name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dstack_core", "dstack_core.testing", "dstack_core.testing.plugin"]


def test_the_entry_point_names_the_plugin_and_the_extra_what_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["pytest11"].values()
    assert import_module(module).__name__ == PLUGIN[-1]
    assert project["optional-dependencies"]["testing"] == ["dstack-core[local]", "pytest>=8"]


@pytest.fixture
def server() -> DstackServer:
    return DstackServer()


def submit(client: Client, name: str, **more: object) -> None:
    task = {"type": "task", "commands": ["echo trained"], "env": {"KEY": "s3cret"}, "max_price": 2.0}
    client.runs.submit(task, run_name=name, **more).wait(poll_interval=0.1)  # type: ignore[arg-type]


def test_assertions_pass_and_their_messages_are_readable(server: DstackServer) -> None:
    with server, server.client() as client:
        with pytest.raises(AssertionError) as raised:
            server.run()
        assert str(raised.value) == "Expected one run, got 0."
        submit(client, "nightly-train-9k2f01xq", marker="engine:dag/train/1")
        server.assert_one_run_per_try()
        server.assert_nothing_left()
        server.assert_scenarios_happened()
        run = server.assert_submitted("train", max_price=2.0, env={"KEY": "s3cret"}, type="task")
        assert (run.attempts, run.log, run.finished, run.marker) == (
            1,
            ("trained",),
            True,
            "engine:dag/train/1",
        )
        server.assert_log("trained")
        assert server.submitted[0]["commands"] == ["echo trained"]
        assert server.requests("runs/apply") == 1

        submit(client, "other", marker="engine:dag/train/1")
        client.runs.submit({"type": "task", "commands": ["sleep 100"]}, run_name="long")
        server.scenarios.fail_pull(run="never")
        failures = []
        for check in (
            server.assert_one_run_per_try,
            server.assert_nothing_left,
            server.assert_scenarios_happened,
            lambda: server.run("nothing"),
            lambda: server.assert_submitted("train", max_price=3.0),
            lambda: server.assert_submitted("train", env={}),
            lambda: server.assert_log("lost", "train"),
        ):
            with pytest.raises(AssertionError) as raised:
                check()
            failures.append(str(raised.value))
        assert failures[0].startswith(
            "Expected one run for the try engine:dag/train/1, got 2. Runs:\n  nightly-train"
        )
        assert failures[1].startswith("Expected no unfinished run, got 1. Runs:\n  long: ")
        assert failures[2].startswith(
            "Expected every scenario to happen, got none of: fail_pull of run 'never'."
        )
        assert (
            "Expected one run 'nothing', got 0. Runs:\n  nightly-train-9k2f01xq: done, all_jobs_done"
            in failures[3]
        )
        assert "(attempts: done_by_runner)" in failures[3]
        assert failures[4] == "Run nightly-train-9k2f01xq was submitted with max_price: 2.0 instead of 3.0."
        assert failures[5] == "Run nightly-train-9k2f01xq was submitted with env: another value."
        assert failures[6].endswith("Its end:\n  trained")
        assert not any("s3cret" in failure for failure in failures)

        client.runs.stop("long")
        assert server.stopped == ["long"]
    assert "s3cret" not in repr(server.runs)
    # What it saw can be read after its end.
    assert len(server.runs) == 3


def fail_in(server: DstackServer) -> None:
    assert os.environ["DSTACK_PROJECT"] == server.project
    raise KeyError("of the test")


def test_the_environment_is_restored(server: DstackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_PROJECT", "before")
    monkeypatch.delenv("DSTACK_TOKEN", raising=False)
    with server:
        with pytest.raises(KeyError, match="of the test"), environment(server):
            fail_in(server)
        assert repr(server).startswith("DstackServer(LocalServer(http://127.0.0.1")
    assert os.environ["DSTACK_PROJECT"] == "before"
    assert "DSTACK_TOKEN" not in os.environ
