"""What a user sees in a browser: the connection form, and the links on a task's page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Page, expect, sync_playwright

from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import runs_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.browser]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
_PATIENCE_MS = 45_000


@pytest.fixture(scope="module")
def page(components: Components) -> Iterator[Page]:
    """Open a browser; with all users being admins Airflow asks for no password."""
    assert CHROMIUM, "no chromium on the PATH; install the package chromium, or set CHROMIUM"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1300}, color_scheme="light")
        page.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        yield page
        browser.close()


def test_the_connection_form_has_labels_and_placeholders(page: Page, components: Components) -> None:
    page.goto(f"{components.url}/connections")
    page.get_by_role("button", name="Add Connection").click()
    form = page.get_by_role("dialog")
    chooser = form.get_by_role("combobox").first
    chooser.click()
    chooser.press_sequentially("dstack")
    page.get_by_role("option", name="dstack", exact=True).click()
    for label in ("Server URL", "Project", "Token"):
        expect(form.get_by_text(label, exact=True).first).to_be_visible()
    expect(form.get_by_placeholder("https://dstack.example.com")).to_be_visible()
    expect(form.get_by_placeholder("token of the dstack user")).to_have_attribute("type", "password")
    for hidden in ("Schema", "Port"):
        expect(form.get_by_text(hidden, exact=True)).to_have_count(0)
    page.screenshot(path=SCREENSHOTS / "airflow-connection.png")
    # Airflow shows one group of fields at a time.
    form.get_by_role("button", name="Extra Fields", exact=True).click()
    for label in ("Verify TLS certificate", "CA bundle", "Timeout"):
        expect(form.get_by_text(label, exact=True).first).to_be_visible()
    page.screenshot(path=SCREENSHOTS / "airflow-connection-extra.png")


def test_the_task_page_links_to_the_run_while_it_runs(
    page: Page, components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_id = components.trigger("sync", command=f"echo training; until [ -e {gate} ]; do sleep 0.1; done")
    path = f"/api/v2/dags/sync/dagRuns/{run_id}/taskInstances/train/links"
    url = wait_for("link", lambda: components.call("GET", path)["extra_links"]["dstack run"])
    (run,) = runs_of(shared_server, f"airflow:sync/{run_id}/")
    assert url == run.url
    assert components.task("sync", run_id)["state"] == "running"
    page.goto(f"{components.url}/dags/sync/runs/{run_id}/tasks/train/details")
    link = page.get_by_role("link", name="dstack run")
    expect(link).to_have_attribute("href", run.url)
    page.screenshot(path=SCREENSHOTS / "airflow-task.png")
    gate.touch()
    components.wait_for_state("sync", run_id, "success")
    assert components.call("GET", path)["extra_links"]["dstack run"] == run.url


_REPORTING = """
for i in 1 2 3; do echo '::dstack::{"kind":"metric","step":'$i',"loss":0.'$((9 - i))'}'; done
echo '::dstack::{"kind":"progress","done":3,"total":3,"text":"epoch 3"}'
echo '::dstack::{"kind":"link","url":"https://wandb.ai/team/run","text":"Curves"}'
echo '::dstack::{"kind":"table","name":"classes","columns":["class","recall"],"rows":[["cat",0.9],["dog",0.8]]}'
echo '::dstack::{"kind":"checkpoint","path":"/checkpoints/3.pt","step":3}'
echo '::dstack::{"kind":"asset","uri":"s3://models/model.pt","metadata":{"epochs":3}}'
"""


def test_the_xcoms_of_a_task_show_what_its_run_reported(page: Page, components: Components) -> None:
    run_id = components.trigger("sync", command=_REPORTING)
    components.wait_for_state("sync", run_id, "success")
    page.goto(f"{components.url}/dags/sync/runs/{run_id}/tasks/train/xcom")
    for key in ("dstack_metrics", "dstack_links", "dstack_tables", "dstack_checkpoint", "dstack_assets"):
        expect(page.get_by_text(key, exact=True).first).to_be_visible()
    # The values need a viewer of JSON, which Airflow loads from the internet.
    page.screenshot(path=SCREENSHOTS / "airflow-reports.png")


def test_the_tab_utilization_shows_the_chart_of_the_run(page: Page, components: Components) -> None:
    run_id = components.trigger("measured")
    components.wait_for_state("measured", run_id, "success")
    page.goto(f"{components.url}/dags/measured/runs/{run_id}/tasks/train")
    page.get_by_role("link", name="Utilization").click()
    frame = page.frame_locator("iframe")
    expect(frame.get_by_text("The run used GPU")).to_be_visible()
    chart = frame.get_by_role("img")
    expect(chart).to_be_visible()
    # The image was decoded: one that the policy refuses has no size.
    assert chart.evaluate("image => image.decode().then(() => image.naturalWidth)") == 720
    page.screenshot(path=SCREENSHOTS / "airflow-utilization.png")


def test_the_tab_utilization_explains_that_there_is_nothing_to_show(
    page: Page, components: Components
) -> None:
    run_id = components.trigger("sync", command="true")
    components.wait_for_state("sync", run_id, "success")
    page.goto(f"{components.url}/dags/sync/runs/{run_id}/tasks/train")
    page.get_by_role("link", name="Utilization").click()
    expect(page.frame_locator("iframe").get_by_text("No values. They are here once")).to_be_visible()


def test_airflow_refuses_the_values_to_who_is_not_logged_in(components: Components) -> None:
    # The page has no data, so anybody may load it; what it reads is Airflow's, which asks for a login.
    assert requests.get(f"{components.url}/dstack-utilization/", timeout=30).status_code == 200
    entry = "/api/v2/dags/measured/dagRuns/x/taskInstances/train/xcomEntries/dstack_utilization"
    assert requests.get(components.url + entry, timeout=30).status_code == 401
