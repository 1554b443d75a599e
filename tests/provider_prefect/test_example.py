"""The example flow and the demo."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_core.local import LocalServer

from .support import the_run

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("prefect_server")
def test_the_example_trains_a_model(dstack: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SERVER_URL", dstack.url), ("PROJECT", dstack.project), ("TOKEN", dstack.token)):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    path = ROOT / "flows" / "example_dstack_run.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outcome = module.example_dstack_run(epochs=2)
    assert outcome["status"] == "done"
    assert outcome["run_id"] == the_run(dstack).id


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
