"""``prefect-dstack ps``, ``cost`` and ``doctor``."""

from __future__ import annotations

import json
import time

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack.__main__ import app
from tests.ports import free_port


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        status = app(arguments) or 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(autouse=True)
def environment(dstack: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_SERVER_URL", dstack.url)
    monkeypatch.setenv("DSTACK_PROJECT", dstack.project)
    monkeypatch.setenv("DSTACK_TOKEN", dstack.token)


def test_runs_of_flow_runs_are_listed_and_what_they_cost(
    dstack: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with dstack.client() as client:
        for name, marker in (("of-a-flow", "prefect:flow_run/1/stop/ab-0/1"), ("of-a-user", "user:me")):
            client.runs.submit(Task(commands=["true"]), name, marker=marker).wait(60, poll_interval=0.1)
    status, out, _ = shown(capsys, "ps", "--all", "-o", "json")
    names = {row["name"] for row in json.loads(out)}
    assert (status, "of-a-flow" in names, "of-a-user" in names) == (0, True, False)
    _, out, _ = shown(capsys, "ps", "--all", "--every")
    assert {"of-a-flow", "of-a-user"} <= {line.split()[0] for line in out.splitlines()}
    _, out, _ = shown(capsys, "cost", "-o", "json")
    assert "user:me" in {row["group"] for row in json.loads(out)}
    with dstack.client() as client:
        tags = {"prefect-flow": "train-nightly", "prefect-task": "fit"}
        client.runs.submit(Task(commands=["true"]), "tagged", tags=tags).wait(60, poll_interval=0.1)
    _, out, _ = shown(capsys, "cost", "--flow", "Train nightly", "--since", "1d", "--csv")
    assert out.splitlines()[0] == "task,runs,cost_usd"
    assert [line.rpartition(",")[0] for line in out.splitlines()[1:]] == ["fit,1"]
    status, _, err = shown(capsys, "cost", "--by", "colour")
    assert (status, err.startswith("by: expected owner")) == (1, True)


def test_doctor_checks_dstack_and_prefect(
    dstack: LocalServer,
    prefect_server: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, _ = shown(capsys, "doctor", "-o", "json")
    states = {each["check"]: each["state"] for each in json.loads(out)}
    assert (status, states["Prefect"], states["token"], states["machines"]) == (0, "ok", "ok", "ok")
    assert dstack.token not in out
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        status, out, _ = shown(capsys, "doctor")
        assert status == 1
        assert "error    Prefect: The Prefect server does not answer" in out
    monkeypatch.setenv("DSTACK_TOKEN", "wrong")
    status, out, _ = shown(capsys, "doctor")
    assert status == 1
    assert "error    token: " in out


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("command", ["ps", "cost", "reap"])
def test_a_block_that_does_not_exist_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = shown(capsys, command, "--credentials", "nope")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "credentials: expected the name of a saved DstackCredentials block, got 'nope'" in err
    assert "prefect block ls" in err


@pytest.mark.usefixtures("prefect_server")
def test_doctor_finds_that_a_block_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = shown(capsys, "doctor", "--credentials", "nope")
    assert (status, "error    configuration: credentials: expected the name" in out) == (1, True)


@pytest.mark.parametrize("command", ["ps", "cost", "reap"])
def test_a_prefect_server_that_does_not_answer_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        status, out, err = shown(capsys, command, "--credentials", "nope")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("The Prefect server does not answer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "has no active runs of Prefect flow runs."),
        (("--every",), "has no active runs."),
        (("--all",), "has no runs of Prefect flow runs."),
        (("-a", "--every"), "has no runs."),
    ],
)
def test_an_empty_list_names_what_is_missing(
    options: tuple[str, ...], words: str, dstack: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, "ps", *options)[:2] == (0, f"Project {dstack.project} {words}\n")


@pytest.mark.parametrize("command", ["ps", "cost", "doctor", "reap"])
def test_the_help_is_for_a_person_at_a_terminal(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = shown(capsys, command, "--help")
    assert "Returns" not in out
    assert ("--output" in out) == (command != "reap")
    assert "--json" not in out


@pytest.mark.parametrize("command", ["ps", "cost"])
def test_a_dstack_server_that_is_away_is_an_error_within_seconds(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTACK_SERVER_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    status, out, err = shown(capsys, command)
    # The retry budget of a task is 30 s and more.
    assert time.monotonic() - started < 20
    assert (status, out, len(err.splitlines())) == (1, "", 1)
