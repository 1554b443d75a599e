"""With ``ui_url``, nothing that a person reads has the address at which flow runs reach the server."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import CallbackEvent, RunCallbacks, RunFailedError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, deploy_service, run_task

from .support import artifacts_of, events_of, log_records, state_of, the_run, until
from .test_deploy import saying

pytestmark = pytest.mark.usefixtures("prefect_server")

# A proxy may add a path.
UI = "https://ui.example.com/dstack"


class Journal(RunCallbacks):
    """Callbacks that keep what they were called with, as text."""

    texts: ClassVar[list[str]] = []

    def _note(self, event: CallbackEvent) -> None:
        self.texts.append(str(event))

    on_submitted = on_provisioning = on_running = on_log_lines = on_metric = on_ended = _note


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_failed_run_links_to_the_ui_alone(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    block = DstackCredentials(**{**credentials.model_dump(), "ui_url": f"{UI}/"})
    ids: list[Any] = []
    Journal.texts.clear()

    @flow
    def failing() -> None:
        ids.append(flow_run.id)
        configuration = {"type": "task", "name": "train", "commands": ["sleep 0.5", "exit 7"]}
        options = {"poll_interval": 0.1, "debug_on_failure": "1s", "callbacks": [Journal()]}
        task.submit(configuration, block, **options).result()

    with pytest.raises(RunFailedError) as raised:
        failing()
    run = the_run(dstack)
    page = f"{UI}/projects/{dstack.project}/runs/{run.id}"
    events = until(lambda: (e := events_of(run.id)) and len(e) >= 2 and e, seconds=20, what="events")
    artifacts = artifacts_of(ids[0]).values()
    texts = {
        "log": "\n".join(log_records(ids[0], last="Finished in state Failed")),
        "artifacts": "\n".join(f"{each.data} {each.description} {each.metadata_}" for each in artifacts),
        "events": json.dumps(events),
        "callbacks": "\n".join(Journal.texts),
        "error": f"{raised.value} {raised.value!r}",
        "state": str(state_of(ids[0]).message),
    }
    address = dstack.url.removeprefix("http://")
    assert [name for name, text in texts.items() if address in text] == []
    assert all(page in texts[name] for name in ("log", "artifacts", "events", "callbacks"))


def test_the_log_has_the_address_of_a_service_for_browsers(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    block = DstackCredentials(**{**credentials.model_dump(), "ui_url": UI})
    ids: list[Any] = []

    @flow
    def deploying() -> dict[str, Any]:
        ids.append(flow_run.id)
        return dict(deploy_service(saying("hello"), block, poll_interval=0.2))

    deployed = deploying()
    try:
        # The value is for other flow runs.
        assert deployed["service_url"].startswith(dstack.url)
        link = deployed["service_url"].replace(dstack.url, UI)
        assert any(f": {link}" in record for record in log_records(ids[0], last="Service said: "))
    finally:
        with dstack.client() as client:
            client.runs.stop("said", abort=True, until="ended")
