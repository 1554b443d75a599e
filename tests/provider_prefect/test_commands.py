"""``prefect-dstack ps``, ``cost`` and ``doctor``."""

from __future__ import annotations

import json

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
    status, out, _ = shown(capsys, "ps", "--finished", "--json")
    names = {row["name"] for row in json.loads(out)}
    assert (status, "of-a-flow" in names, "of-a-user" in names) == (0, True, False)
    _, out, _ = shown(capsys, "ps", "--finished", "--every")
    assert {"of-a-flow", "of-a-user"} <= {line.split()[0] for line in out.splitlines()}
    _, out, _ = shown(capsys, "cost", "--json")
    assert "user:me" in {row["group"] for row in json.loads(out)}
    status, _, err = shown(capsys, "cost", "--by", "colour")
    assert (status, err.startswith("by: expected owner")) == (1, True)


def test_doctor_checks_dstack_and_prefect(
    dstack: LocalServer,
    prefect_server: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, _ = shown(capsys, "doctor", "--json")
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
