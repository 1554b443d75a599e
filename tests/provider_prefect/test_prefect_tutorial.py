"""The Prefect tutorial as a reader follows it: its commands, its flow, and the model that Prefect shows."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.docs.blocks import ROOT, check_outputs
from tests.docs.tutorial import Tutorial, wait_for_address
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(900)]


def test_the_tutorial_ends_with_a_model_among_the_artifacts(tmp_path: Path) -> None:
    port = free_port()
    tutorial = Tutorial(
        ROOT / "docs" / "tutorials" / "prefect.md",
        tmp_path,
        {"3000": free_port(), "4200": port},
        {"PREFECT_SERVER_API_PORT": str(port), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
    )
    (flow,) = tutorial.code("python prefect")
    (tmp_path / "train_flow.py").write_text(flow.code)
    start_dstack, start_prefect, train = tutorial.code("shell tutorial")
    api = f"http://127.0.0.1:{port}/api"
    with tutorial.running(start_dstack) as dstack_output, tutorial.running(start_prefect) as prefect_output:
        wait_for_address(f"{api}/health", prefect_output)
        assert tutorial.on_free_ports(start_dstack.outputs[0]).strip() in dstack_output.read_text()
        check_outputs(flow, tutorial.run(train))
        found = httpx.post(f"{api}/artifacts/latest/filter", json={}, timeout=60).raise_for_status().json()
    models = [json.loads(artifact["data"]) for artifact in found if artifact["key"] == "model"]
    assert models == [[{"slope": 2.96, "offset": -0.95, "loss": 0.0026}]]
