"""The Airflow tutorial as a reader follows it: its commands, its DAG, its clicks, its screenshots."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.docs.blocks import ROOT
from tests.docs.tutorial import CHROMIUM, SCREENSHOTS, Tutorial, wait_for_address
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.long,
    pytest.mark.browser,
    pytest.mark.timeout(900),
]

_PATIENCE_MS = 120_000


def test_the_tutorial_ends_with_a_model_in_the_ui(tmp_path: Path) -> None:
    port = free_port()
    tutorial = Tutorial(
        ROOT / "docs" / "tutorials" / "airflow.md",
        tmp_path,
        {"3000": free_port(), "8080": port},
        {
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": f"http://localhost:{port}",
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            # A busy machine; the default of 5 s fails the task before it starts.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
        },
    )
    dags = tmp_path / "airflow" / "dags"
    dags.mkdir(parents=True)
    (dag,) = tutorial.code("python airflow")
    (dags / "train_model.py").write_text(dag.code)
    start_dstack, start_airflow = tutorial.code("shell tutorial")
    with (
        tutorial.running(start_dstack) as dstack_output,
        tutorial.running(start_airflow) as airflow_output,
        sync_playwright() as playwright,
    ):
        wait_for_address(f"http://localhost:{port}/api/v2/monitor/health", airflow_output)
        assert tutorial.on_free_ports(start_dstack.outputs[0]).strip() in dstack_output.read_text()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 640}, color_scheme="light")
        page.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        try:
            follow_in_the_ui(page, f"http://localhost:{port}")
        finally:
            page.screenshot(path=SCREENSHOTS / "tutorial-airflow-last.png")
            browser.close()


def follow_in_the_ui(page: Page, url: str) -> None:
    """Trigger the DAG, read the log of its task, and open the model."""
    page.goto(f"{url}/dags/train_model")
    page.get_by_role("button", name=re.compile("Trigger")).first.click()
    page.get_by_role("dialog").get_by_role("button", name=re.compile("^Trigger")).last.click()
    page.wait_for_url("**/runs/*")
    run = page.url
    page.goto(f"{run}/tasks/train")
    expect(page.get_by_text("epoch 10 loss 0.0026").first).to_be_visible()
    page.screenshot(path=SCREENSHOTS / "tutorial-airflow-log.png")
    page.set_viewport_size({"width": 1280, "height": 820})
    page.get_by_role("link", name="Storage").last.click()
    page.get_by_text("XCom", exact=True).last.click()
    expect(page.get_by_text("2.96").first).to_be_visible()
    page.screenshot(path=SCREENSHOTS / "tutorial-airflow-model.png")
    page.goto(f"{run}/tasks/predict")
    expect(page.get_by_text("so y(10) = 28.7").first).to_be_visible()
