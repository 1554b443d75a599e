"""The tags of a flow's runs, and the addresses that its links lead to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow, task
from pydantic import ValidationError

from dstack_core import ConfigurationError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackRun, arun_task, dstack_task, run_task
from prefect_dstack._report import _run_links
from prefect_dstack._tags import _as_tags, tags_of_worker
from prefect_dstack.functions import _split

from .specs import specs
from .ways import FAST

CONFIGURATION = {"type": "task", "commands": ["true"]}


def tags_of(server: LocalServer) -> list[Any]:
    return [spec["configuration"]["tags"] for spec in specs(server)]


@pytest.mark.usefixtures("prefect_server")
def test_runs_have_tags_that_name_their_flow_and_task(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    own = credentials.model_copy(update={"default_tags": {"team": "block", "floor": "3"}})
    off = credentials.model_copy(update={"default_tags": False})

    @task(name="Fit it")
    def fit() -> None:
        DstackRun(credentials=credentials, configuration=CONFIGURATION, max_duration="1h").trigger()

    @flow(name="Nightly", flow_run_name="of-today")
    async def nightly() -> None:
        await arun_task(CONFIGURATION, own, tags={"team": "option"}, **FAST)
        run_task(CONFIGURATION, off, max_duration="2h", **FAST)
        run_task(CONFIGURATION, own, max_duration="3h", tags=False, **FAST)
        fit()

    asyncio.run(nightly())
    first, of_block, of_option, of_user_task = tags_of(dstack)
    flow_run_id = first.pop("prefect-flow-run-id")
    automatic = {"prefect-flow": "nightly", "prefect-flow-run": "of-today"}
    assert first == {**automatic, "prefect-task": "arun_task", "team": "option", "floor": "3"}
    assert (of_block, of_option) == (None, None)
    assert of_user_task == {**automatic, "prefect-task": "fit-it", "prefect-flow-run-id": flow_run_id}


def test_the_machine_of_a_flow_run_has_its_labels_as_tags() -> None:
    labels = {
        "prefect.io/flow-name": "Nightly",
        "prefect.io/deployment-name": "prod",
        "prefect.io/flow-run-name": "brave-otter",
        "prefect.io/flow-run-id": "019b",
        "prefect.io/work-pool-name": "gpus",
        "prefect.io/version": "3.8.8",
        "Cost Center": "7",
    }
    assert tags_of_worker(labels) == {
        "cost-center": "7",
        "prefect-flow": "nightly",
        "prefect-deployment": "prod",
        "prefect-flow-run": "brave-otter",
        "prefect-flow-run-id": "019b",
        "prefect-work-pool": "gpus",
    }
    assert _as_tags({"训练": "x", "prefect-flow": "训练", "b": None, "c": "--"}) == {
        "label-a29c0d": "x",
        "prefect-flow": "flow-a29c0d",
    }


def test_a_list_of_tags_is_prefects_and_a_dict_is_dstacks() -> None:
    assert _split({"tags": ["gpu"]}) == ({"tags": ["gpu"]}, {})
    assert _split({"tags": {"team": "ml"}}) == ({}, {"tags": {"team": "ml"}})
    assert _split({"tags": False, "retries": 1}) == ({"retries": 1}, {"tags": False})

    @dstack_task(tags=["gpu"])
    def train() -> None: ...

    assert train.tags == {"gpu"}


def test_wrong_tags_are_refused(credentials: DstackCredentials) -> None:
    fields = {"server_url": "http://s", "project_name": "p", "user_token": "t"}
    with pytest.raises(ValidationError, match=r"expected a value of at most 256 letters .* for team"):
        DstackCredentials(**fields, default_tags={"team": "ü"})
    with pytest.raises(ValidationError, match="expected an address such as"):
        DstackCredentials(**fields, ui_url="gpu")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="got 'http://a b'"):
        DstackCredentials(**fields, ui_url="http://a b")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="expected an address without a user and password"):
        DstackCredentials(**fields, ui_url="https://u:p@x.y")  # type: ignore[arg-type]

    @flow
    def wrong() -> None:
        run_task(CONFIGURATION, credentials, tags={"a b": "c"})

    with pytest.raises(ConfigurationError, match=r"^tags: expected a key of 1 to 60 letters.* got 'a b'"):
        wrong()


def test_the_links_lead_to_pages_that_a_browser_reaches(credentials: DstackCredentials) -> None:
    block = credentials.model_copy(update={"ui_url": "https://gpu.example.com/"})
    with block.get_client() as client:
        run = client.runs.submit(CONFIGURATION, run_name="links")
        page = f"https://gpu.example.com/projects/main/runs/{run.id}"
        assert run.url == page
        assert _run_links(run)[1] == (
            f"[Run links on dstack]({page}) · [log]({page}/logs) · [metrics]({page}/metrics)"
        )
    old: Any = SimpleNamespace(name="old", url="u", logs_url="u", metrics_url=None, id=uuid4())
    assert _run_links(old)[1] == "[Run old on dstack](u)"
