"""What a user of Prefect sees in a browser of what a run has reported; the pictures are those of the docs."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.runtime import flow_run

from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, run_task
from tests.reporting import ASSET, SKIP_REASON, skipping, training

from .support import all_runs, artifacts_of, events_of, until
from .ways import FAST

playwright_api = pytest.importorskip("playwright.sync_api")

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.browser]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
_PATIENCE_MS = 20_000


class Ui:
    """Prefect's UI in a browser."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address

    def shows(self, path: str, *texts: str) -> None:
        """Open a page and wait until it shows these texts."""
        self.page.goto(f"{self.address}{path}")
        for text in texts:
            playwright_api.expect(self.page.get_by_text(text).filter(visible=True).first).to_be_visible()

    def picture(self, name: str, height: int, top: int = 0) -> None:
        """Take a picture of the page's content, without the navigation, from ``top`` on."""
        # The pointer would show a tip, and animations are those of the theme.
        self.page.mouse.move(1199, 1)
        clip = {"x": 256, "y": top, "width": 944, "height": height}
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", clip=clip, animations="disabled")


@pytest.fixture
def ui(prefect_server: str) -> Iterator[Ui]:
    """Open a browser."""
    assert CHROMIUM, "no chromium on the PATH; install the package chromium, or set CHROMIUM"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1500}, color_scheme="light")
        page.set_default_timeout(_PATIENCE_MS)
        playwright_api.expect.set_options(timeout=_PATIENCE_MS)
        try:
            yield Ui(page, prefect_server.removesuffix("/api"))
        finally:
            # What was on the screen when an expectation failed.
            page.screenshot(path=SCREENSHOTS / "prefect-last.png")
            browser.close()


def test_each_kind_of_message_is_seen(
    ui: Ui, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    gate, owner = tmp_path / "gate", []

    @flow(name="train classifier", log_prints=True)
    def train() -> dict[str, Any]:
        owner.append(flow_run.id)
        return dict(
            run_task({"type": "task", "name": "train", "commands": [training(gate)]}, credentials, **FAST)
        )

    @flow(name="refresh")
    def refresh() -> dict[str, Any]:
        owner.append(flow_run.id)
        return dict(
            run_task({"type": "task", "name": "refresh", "commands": [skipping()]}, credentials, **FAST)
        )

    # The browser has an event loop in this thread, which a flow of a plain function does not accept.
    training_flow = _in_thread(train)
    try:
        until(lambda: owner and _key(owner[0], "-percent") and _data(owner[0], "-percent") == 70)
        ui.shows(f"/runs/flow-run/{owner[0]}", "Running")
        ui.page.get_by_text("Artifacts", exact=True).last.click()
        playwright_api.expect(ui.page.get_by_text("-percent").last).to_be_visible()
        ui.picture("prefect-report-progress", 830, top=500)
    finally:
        gate.touch()
        training_flow.join()
    skipping_flow = _in_thread(refresh)
    skipping_flow.join()

    ui.shows(f"/runs/flow-run/{owner[0]}", "Completed")
    ui.page.get_by_text("Artifacts", exact=True).last.click()
    playwright_api.expect(ui.page.get_by_text("-image-confusion-matrix").last).to_be_visible()
    ui.shows(_page(owner[0], "-metrics"), "0.0985", "0.9522")
    ui.picture("prefect-report-metrics", 420)
    ui.shows(_page(owner[0], "-table-recall-by-class"), "recall", "0.86")
    ui.picture("prefect-report-table", 460)
    ui.shows(_page(owner[0], "-link-curves"), "Curves")
    ui.picture("prefect-report-link", 250)
    ui.shows(_page(owner[0], "-image-confusion-matrix"))
    ui.page.locator("img[src^='data:image/png']").wait_for()
    ui.picture("prefect-report-image", 470)
    ui.shows(_page(owner[0], "dstack-train"), "best_epoch", "/checkpoints/10.pt")
    ui.picture("prefect-report-outcome", 980)
    ui.shows(_page(owner[1], "dstack-refresh"), SKIP_REASON)
    ui.picture("prefect-report-skip", 850)
    event = until(lambda: _asset_events(ASSET))[0]
    day = event["occurred"][:10]
    ui.shows(f"/events/event/{day}/{event['id']}", "prefect.asset.materialization.succeeded", ASSET)
    ui.picture("prefect-report-asset", 460)


def test_a_failed_and_a_held_run_are_explained(
    ui: Ui, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner = []
    evaluate = {"type": "task", "name": "evaluate", "commands": ["echo loss 0.9346", "evaluate-model"]}
    commands = ["echo stage $STAGE, key $API_KEY", "echo epoch 1 loss nan", "exit 3"]

    @flow(name="nightly training")
    def nightly() -> None:
        owner.append(flow_run.id)
        states = [
            run_task(evaluate, credentials, tags={"team": "vision"}, return_state=True, **FAST),
            run_task(
                {"type": "task", "name": "train", "commands": commands},
                credentials,
                env={"STAGE": "train", "API_KEY": "4f9a7c21d08e-key"},
                debug_on_failure="30m",
                return_state=True,
                **FAST,
            ),
        ]
        assert all(state.is_failed() for state in states)

    _in_thread(nightly).join()
    ui.shows(f"/runs/flow-run/{owner[0]}", "Completed", "To open a shell in it")
    # The address of the page ends where its line ends.
    evaluated, trained = all_runs(dstack)
    link = ui.page.get_by_role("link", name=evaluated.url)
    assert {link.nth(i).get_attribute("href") for i in range(link.count())} == {evaluated.url}
    # Up to the traceback, which has paths of this machine.
    ui.picture("prefect-failed-log", 328, top=640)
    ui.shows(_page(owner[0], "dstack-evaluate"), "user.not_found", "Check its spelling", "team=vision")
    ui.picture("prefect-failed-outcome", 990)
    ui.shows(
        _page(owner[0], "dstack-train"), "at most 30 min", f"python -m dstack_core attach {trained.name}"
    )
    assert "4f9a7c21d08e-key" not in ui.page.content()
    ui.picture("prefect-held-outcome", 1250)
    ui.shows(_page(owner[0], "dstack-train-page"), "metrics")
    ui.picture("prefect-run-links", 260)
    failed = until(lambda: [one for one in events_of(evaluated.id) if one["event"] == "dstack.run.failed"])[0]
    ui.shows(f"/events/event/{failed['occurred'][:10]}/{failed['id']}", "dstack.run.failed")
    ui.page.get_by_text("Raw", exact=True).click()
    playwright_api.expect(ui.page.get_by_text('"dstack.category"').first).to_be_visible()
    ui.picture("prefect-failed-event", 720, top=780)


def test_an_automation_sends_why_a_run_failed(
    ui: Ui, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    made: list[Any] = []
    evaluate = {"type": "task", "name": "evaluate", "commands": ["evaluate-model"]}

    @flow(name="nightly evaluation")
    def nightly() -> None:
        run_task(evaluate, credentials, return_state=True, **FAST)

    with _chat() as (address, messages):
        # The browser has an event loop in this thread, in which Prefect's methods return coroutines.
        _in_thread(lambda: made.append(_failed_to(address))).join()
        (automation,) = made
        try:
            _in_thread(nightly).join()
            (run,) = all_runs(dstack)
            (message,) = until(lambda: list(messages))
            assert message.startswith(
                f"Run {run.name} failed: user.not_found: failed: its command exited with status 127"
            )
            ui.shows(f"/automations/automation/{automation.id}", "a run has failed", "custom webhook")
            ui.picture("prefect-automation", 300)
            sent = until(lambda: _events({"event": {"name": ["prefect.automation.action.executed"]}}))[0]
            path = f"/events/event/{sent['occurred'][:10]}/{sent['id']}"
            ui.shows(path, "prefect.automation.action.executed")
            ui.picture("prefect-automation-executed", 460)
        finally:
            _in_thread(automation.delete).join()


def _failed_to(address: str) -> Any:
    """Return an automation that sends why a run failed to ``address``."""
    # Its optional fields have no default for a type checker.
    webhook: Any = CustomWebhookNotificationBlock
    block = webhook(name="chat", url=address, json_data={"text": "{{subject}}: {{body}}"})
    action = SendNotification(
        block_document_id=UUID(str(block.save("chat", overwrite=True))),
        subject="Run {{ event.payload.run_name }} failed",
        body="{{ event.payload.category }}: {{ event.payload.message }}",
    )
    trigger = EventTrigger(
        expect={"dstack.run.failed"}, posture=Posture.Reactive, threshold=1, within=timedelta(0)
    )
    return Automation(name="a run has failed", trigger=trigger, actions=[action]).create()


@contextmanager
def _chat() -> Iterator[tuple[str, list[str]]]:
    """Run a server that keeps the texts that are sent to it."""
    messages: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            messages.append(json.loads(body)["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", messages
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _in_thread(flow_function: Any) -> threading.Thread:
    thread = threading.Thread(target=copy_context().run, args=(flow_function,))
    thread.start()
    return thread


def _key(owner: Any, end: str) -> str:
    return next((key for key in artifacts_of(owner) if key.endswith(end)), "")


def _data(owner: Any, end: str) -> Any:
    return artifacts_of(owner)[_key(owner, end)].data


def _page(owner: Any, end: str) -> str:
    return f"/artifacts/artifact/{artifacts_of(owner)[_key(owner, end)].id}"


def _asset_events(uri: str) -> list[Any]:
    return _events({"resource": {"id": [uri]}})


def _events(chosen: dict[str, Any]) -> list[Any]:
    reply = httpx.post(f"{os.environ['PREFECT_API_URL']}/events/filter", json={"filter": chosen})
    return list(reply.raise_for_status().json()["events"])
