"""What a user sees in a browser: the connection form, links, and what a run reports.

The pictures are those of the documentation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Locator, Page, expect, sync_playwright

from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import connection_json, runs_of, wait_for
from tests.reporting import SKIP_REASON, skipping, training

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
    for label in ("Verify TLS certificate", "CA bundle", "Timeout", "Address for browsers", "Default tags"):
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
    for name, address in (("dstack logs", run.logs_url), ("dstack metrics", run.metrics_url)):
        expect(page.get_by_role("link", name=name)).to_have_attribute("href", str(address))
    assert run.name.startswith("sync-train-")
    picture(page, "airflow-task", 60, 520)
    gate.touch()
    components.wait_for_state("sync", run_id, "success")
    assert components.call("GET", path)["extra_links"]["dstack run"] == run.url


@pytest.fixture(scope="module")
def reporting_run(page: Page, components: Components, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a DAG run: one task has reported every kind of message, and one a skip."""
    gate = tmp_path_factory.mktemp("reports") / "gate"
    run_id = components.trigger("reports", train=training(gate), refresh=skipping())
    address = f"{components.url}/dags/reports/runs/{run_id}"
    page.goto(f"{address}/tasks/train")
    expect(page.get_by_text("epoch 7 loss 0.2085")).to_be_visible()
    gate.touch()
    components.wait_for_run_end("reports", run_id)
    return address


def picture(page: Page, name: str, top: int, bottom: float) -> None:
    """Take a picture of the part of a page that belongs to the task."""
    clip = {"x": 318, "y": top, "width": 962, "height": bottom - top}
    page.screenshot(path=SCREENSHOTS / f"{name}.png", clip=clip, animations="disabled")  # type: ignore[arg-type]


def bottom_of(found: Locator) -> float:
    """Return where an element ends on the page."""
    box = found.bounding_box()
    assert box is not None
    return box["y"] + box["height"]


def test_the_log_of_a_task_shows_progress_and_links(page: Page, reporting_run: str) -> None:
    page.goto(f"{reporting_run}/tasks/train")
    for text in ("Progress: 100 %, 10 of 10 (epoch 10)", "Link: Curves", "epoch 10 loss 0.0985"):
        expect(page.get_by_text(text).first).to_be_visible()
    address = "https://wandb.ai/team/classifier/runs/7"
    expect(page.get_by_role("link", name=address).first).to_have_attribute("href", address)
    picture(page, "airflow-report-log", 60, bottom_of(page.get_by_text("Post Execute")) + 20)


def test_the_xcoms_of_a_task_show_what_its_run_reported(page: Page, reporting_run: str) -> None:
    page.set_viewport_size({"width": 1280, "height": 1800})
    page.goto(f"{reporting_run}/tasks/train/xcom")
    for key in ("dstack_metrics", "dstack_links", "dstack_tables", "dstack_checkpoint", "dstack_assets"):
        expect(page.get_by_text(key, exact=True).first).to_be_visible()
    page.get_by_role("button", name="Expand").first.click()
    for text in ("0.0985", "0.96", "/checkpoints/10.pt", "best_epoch"):
        expect(page.locator(".monaco-editor").get_by_text(text).first).to_be_visible()
    picture(page, "airflow-report-xcoms", 214, bottom_of(page.get_by_role("row", name="return_value")))
    page.set_viewport_size({"width": 1280, "height": 1300})


def test_the_event_of_an_asset_shows_what_the_run_reported_of_it(page: Page, reporting_run: str) -> None:
    page.goto(f"{reporting_run}/tasks/train/asset_events")
    folded = page.locator(".monaco-editor .codicon-folding-collapsed")
    for text in ("run_name", "loss", "best_epoch", "pytorch"):
        folded.first.click()
        expect(page.locator(".monaco-editor").get_by_text(text).first).to_be_visible()
    # An open part has no mark unless the pointer is on it.
    page.mouse.move(1279, 1)
    picture(page, "airflow-report-asset", 214, bottom_of(page.locator(".monaco-editor").first) + 40)


def test_a_run_that_reports_a_skip_is_a_skipped_task(page: Page, reporting_run: str) -> None:
    page.goto(f"{reporting_run}/tasks/refresh")
    expect(page.get_by_text("Skipped", exact=True).first).to_be_visible()
    expect(page.get_by_text(f"Nothing to do: {SKIP_REASON}").first).to_be_visible()
    picture(page, "airflow-report-skip", 60, bottom_of(page.get_by_text("Post Execute")) + 20)


@pytest.fixture(scope="module")
def failed_run(
    page: Page, components: Components, shared_server: LocalServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Return the address of a DAG run: one task has waited for a machine and failed, one failed and is held."""
    gate = tmp_path_factory.mktemp("failing") / "gate"
    with LocalServer(step_seconds=2.0) as slow:
        slow_connection = {"connection_id": "slow", **json.loads(connection_json(slow))}
        components.call("POST", "/api/v2/connections", slow_connection)
        run_id = components.trigger("failing", gate=str(gate), connection="slow")
        address = f"{components.url}/dags/failing/runs/{run_id}"
        page.goto(f"{address}/tasks/train")
        expect(page.get_by_text("(still running)").first).to_be_visible()
        # From now on Airflow wraps long lines.
        page.keyboard.press("w")
        gate.touch()
        components.wait_for_run_end("failing", run_id)
    yield address
    for run in runs_of(shared_server, f"airflow:failing/{run_id}/"):
        run.stop()


def test_the_rendered_templates_show_all_but_the_secrets(page: Page, failed_run: str) -> None:
    page.goto(f"{failed_run}/tasks/train/rendered_templates")
    for text in ('"STAGE"', '"***"', '"vision"'):
        expect(page.get_by_text(text).first).to_be_visible()
    assert "4f9a7c21d08e" not in page.content()
    top = bottom_of(page.get_by_role("row", name="configuration").last)
    picture(page, "airflow-rendered", int(top) + 1, bottom_of(page.get_by_role("row", name="tags").last))


def test_the_log_of_a_failed_task_has_the_cause_and_folds_the_waiting(page: Page, failed_run: str) -> None:
    page.goto(f"{failed_run}/tasks/train")
    expect(page.get_by_text("includes its directory (user.not_found).").first).to_be_visible()
    folded = {
        "Provisioning of run": " waits for machine",
        "Setup of run": " waits for image",
        "Install packages": "Successfully installed torch",
    }
    for title, line in folded.items():
        expect(page.get_by_text(line)).to_have_count(0)
        page.get_by_text(title).first.click()
        expect(page.get_by_text(line).first).to_be_visible()
    for line in ("epoch 1 loss 0.9346", "evaluate-model: command not found"):
        expect(page.get_by_text(line)).to_have_count(1)
    fold_the_traceback(page)
    picture(page, "airflow-failed-log", 320, bottom_of(page.get_by_text("Post Execute")) + 20)


def test_the_log_of_a_held_task_has_the_line_that_opens_a_shell(page: Page, failed_run: str) -> None:
    page.goto(f"{failed_run}/tasks/debug")
    expect(page.get_by_text("for at most 0.60 USD. To open a shell in it: python").first).to_be_visible()
    fold_the_traceback(page)
    picture(page, "airflow-held-log", 320, bottom_of(page.get_by_text("Post Execute")) + 20)


def test_the_log_of_a_task_shows_what_callbacks_and_notifiers_did(page: Page, failed_run: str) -> None:
    page.goto(f"{failed_run}/tasks/notify")
    # What is called after the task is in a part that Airflow shows closed.
    page.get_by_text("Post Execute").first.click()
    for text in (" failed: user.not_found, ", " is failed, ", "notify: http"):
        expect(page.get_by_text(text).first).to_be_visible()
    fold_the_traceback(page)
    last = page.get_by_text(" failed: user.not_found, ").last
    picture(page, "airflow-notified-log", 320, bottom_of(last) + 30)


def fold_the_traceback(page: Page) -> None:
    """Close what Airflow shows below the text of an error."""
    page.get_by_test_id("summary-DstackUserError").click()
    expect(page.get_by_text("in result_of").filter(visible=True)).to_have_count(0)
    page.mouse.move(1279, 1)


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


def test_the_page_of_a_chart_is_the_same_for_every_task(components: Components) -> None:
    # It has no data, so anyone may load it; what it reads is Airflow's, with the login of its user.
    pages = [
        requests.get(f"{components.url}/dstack-utilization/", params={"dag_id": name}, timeout=30)
        for name in ("measured", "another")
    ]
    assert [page.status_code for page in pages] == [200, 200]
    assert pages[0].text == pages[1].text
