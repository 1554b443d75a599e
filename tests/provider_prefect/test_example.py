"""The example flow and the demo."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import task
from prefect.blocks.system import Secret
from pydantic import SecretStr

from dstack_core.local import LocalServer
from tests.ports import free_port

from .support import all_runs, outcome_of, the_run, until

ROOT = Path(__file__).parents[2]


def load(name: str) -> Any:
    """Return a module of the folder ``flows``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "flows" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(dstack: LocalServer, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """Name the embedded server in the environment."""
    for name, value in (("SERVER_URL", dstack.url), ("PROJECT", dstack.project), ("TOKEN", dstack.token)):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    return dstack


@pytest.mark.usefixtures("prefect_server")
def test_the_example_trains_a_model(server: LocalServer) -> None:
    outcome = load("example_dstack_run").example_dstack_run(epochs=2)
    assert outcome["status"] == "done"
    assert outcome["run_id"] == the_run(server).id


@pytest.mark.usefixtures("prefect_server")
def test_a_file_is_run_as_it_is(server: LocalServer) -> None:
    outcome = asyncio.run(load("example_dstack_yaml").example_dstack_yaml())
    assert outcome["status"] == "done"
    assert outcome["run_name"].split("-")[-2] == "train"


@pytest.mark.usefixtures("prefect_server")
def test_a_sweep_finds_the_cheapest_and_leaves_out_missing_gpus(server: LocalServer) -> None:
    best = load("example_dstack_sweep").example_dstack_sweep(memories=("16GB", "24GB", "9000GB"))
    outcomes = [outcome_of(run) for run in all_runs(server)]
    done = [outcome for outcome in outcomes if outcome.succeeded]
    assert (len(outcomes), len(done)) == (3, 2)
    assert best["cost"] == min(outcome.cost for outcome in done)


@pytest.mark.usefixtures("prefect_server")
def test_the_best_run_is_picked_by_its_metric(server: LocalServer) -> None:
    best = load("example_dstack_best_run").example_dstack_best_run(rates=(0.001, 0.01, 0.1, 0.99))
    assert best["rate"] == 0.1
    assert best["loss"] < 1e-6
    assert abs(best["weight"] - 3) < 1e-3
    assert len(all_runs(server)) == 4


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_survives_an_interruption(server: LocalServer) -> None:
    server.scenarios.interrupt_after(0, noticed_after=0)
    assert load("example_dstack_spot").train_on_spot() == [
        "attempt 1: interrupted_by_no_capacity",
        "attempt 2: done_by_runner",
    ]


@pytest.mark.usefixtures("prefect_server")
def test_two_steps_run_on_the_machine_of_one_fleet(server: LocalServer) -> None:
    steps = load("example_dstack_fleet").example_dstack_fleet()
    assert [step["status"] for step in steps] == ["done", "done"]
    (name,) = {fleet["name"] for run in server.runs for fleet in run.configuration["fleets"]}
    assert name.startswith("example-dstack-fleet-warm-")
    with server.client() as client:
        until(lambda: client.fleets.get(name) is None)


@pytest.mark.usefixtures("prefect_server")
def test_a_secret_is_in_the_run_by_reference_alone(server: LocalServer) -> None:
    Secret(value=SecretStr("hf_example")).save("hf-token", overwrite=True)
    assert load("example_dstack_secrets").example_dstack_secrets()["status"] == "done"
    run = the_run(server)
    assert run.env["HF_TOKEN"].startswith("${{ secrets.prefect_f_")
    assert b"a token of 10 characters" in b"".join(run.logs())
    with server.client() as client:
        assert client.secrets.list() == []


@pytest.mark.usefixtures("prefect_server")
def test_a_service_is_asked_and_stopped(server: LocalServer) -> None:
    answers = load("example_dstack_service").example_dstack_service(questions=("a", "b"), port=free_port())
    assert answers == ["echo: a", "echo: b"]
    until(lambda: the_run(server).outcome(), seconds=30)
    assert outcome_of(the_run(server)).reason == "stopped_by_user"


@pytest.mark.usefixtures("prefect_server")
def test_a_service_is_stopped_when_asking_fails(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_TOKEN", server.token)
    module = load("example_dstack_service")

    @task
    def fails(url: str, question: str) -> str:
        raise RuntimeError("no answer")

    monkeypatch.setattr(module, "ask", fails)
    with pytest.raises(RuntimeError, match="no answer"):
        module.example_dstack_service(port=free_port())
    until(lambda: the_run(server).outcome(), seconds=30)
    assert outcome_of(the_run(server)).reason == "stopped_by_user"


def test_every_flow_of_the_folder_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert [path.stem for path in (ROOT / "flows").glob("*.py") if f'load("{path.stem}")' not in here] == []


@pytest.mark.slow
def test_the_demo_shows_the_log_and_leaves_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo_prefect.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert shown.returncode == 0, shown.stdout[-3000:]
    assert shown.stdout.index("epoch  1 loss") < shown.stdout.index("the model is")
    assert "status: done" in shown.stdout
