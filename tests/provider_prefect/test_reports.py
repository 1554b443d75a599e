"""What a run reports, read back from a real Prefect server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow, get_client, unmapped
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.events import emit_event
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import flow_run

from dstack_core import OutcomeDict, Progress, Reported, RunFailedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    _cancellation,
    _report,
    arun_task,
    run_task,
    submit_run,
    wait_for_run,
)
from prefect_dstack import _live_artifacts as live_artifacts
from prefect_dstack._live_artifacts import LiveArtifacts
from prefect_dstack._secrets import GitLogin
from prefect_dstack._submission import resolve

from .support import (
    all_runs,
    artifacts_of,
    cancelled_when,
    events_of,
    log_records,
    the_run,
    until,
)
from .ways import FAST, WAYS, Runner

pytestmark = pytest.mark.usefixtures("prefect_server")


def png() -> str:
    """Return an image of one point, in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


IMAGE = png()
MESSAGES: list[dict[str, Any]] = [
    {"kind": "metric", "step": 1, "loss": 0.9000000001, "speed": 10},
    {"kind": "metric", "step": 2, "loss": 0.25, "speed": "nan"},
    {"kind": "metric", "step": 3.0, "loss": 0.5},
    {"kind": "progress", "done": 1, "total": 4},
    {"kind": "progress", "done": 3, "total": 4, "text": "epoch 3"},
    {
        "kind": "table",
        "name": "Classes: top 2",
        "columns": ["class", "n", "n"],
        "rows": [["a", 1, 2], ["b", 3, 4]],
    },
    {"kind": "image", "name": "confusion", "png": IMAGE, "text": "Confusion matrix"},
    {"kind": "link", "url": "https://wandb.example/run (1)", "text": "Weights [best]"},
    {"kind": "asset", "uri": "s3://bucket/model.pt", "metadata": {"rows": 3}},
    {"kind": "asset", "uri": "not a uri"},
    {"kind": "checkpoint", "path": "/data/step-3.pt", "step": 3.0},
    {"kind": "unknown", "x": 1},
    {"kind": "result", "value": {"accuracy": 0.97}},
]


def printed(*messages: dict[str, Any]) -> str:
    """Return the command that prints messages."""
    return "; ".join(f"echo {shlex.quote(f'::dstack::{json.dumps(message)}')}" for message in messages)


REPORTING = Task(name="train", commands=[printed(*MESSAGES)])


def shown_for(flow_run_id: Any) -> dict[str, Any]:
    """Return the newest version of each artifact that shows what a run reports, without the run's name."""
    found = artifacts_of(flow_run_id)
    prefixes = {f"dstack-{name}-" for name in runs_of(found)}
    return {
        key.removeprefix(prefix): item
        for key, item in found.items()
        for prefix in prefixes
        if key.startswith(prefix)
    }


def runs_of(found: dict[str, Any]) -> list[str]:
    return [key.removeprefix("dstack-").removesuffix("-metrics") for key in found if key.endswith("-metrics")]


def asset_events(uri: str) -> list[Any]:
    """Return the events of an asset."""
    reply = httpx.post(
        f"{os.environ['PREFECT_API_URL']}/events/filter",
        json={"filter": {"resource": {"id": [uri]}, "order": "ASC"}},
    )
    return list(reply.json()["events"])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_kind_is_shown_and_the_result_is_returned(
    way: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    uri = f"s3://bucket/{uuid4()}.pt"
    messages = [{**each, "uri": uri} if each.get("metadata") else each for each in MESSAGES]
    task = Task(name="train", commands=[printed(*messages)])
    outcome = way(task, credentials, **FAST)
    assert (outcome["has_result"], outcome["result"]) == (True, {"accuracy": 0.97})
    assert outcome["metrics"] == {"loss": 0.5, "speed": "nan"}
    run = the_run(dstack)
    started = until(lambda: events_of(run.id), seconds=20)[0]
    (owner,) = {
        each["prefect.resource.id"].removeprefix("prefect.flow-run.")
        for each in started["related"]
        if each["prefect.resource.id"].startswith("prefect.flow-run.")
    }
    found = shown_for(owner)
    assert set(found) == {
        "metrics",
        "percent",
        "table-classes-top-2",
        "image-confusion",
        "link-weights-best",
    }
    assert json.loads(found["metrics"].data) == [
        {"name": "loss", "last": 0.5, "step": 3, "min": 0.25, "max": 0.9},
        {"name": "speed", "last": "nan", "step": 2, "min": 10, "max": 10},
    ]
    assert (found["percent"].type, found["percent"].data) == ("progress", 75.0)
    assert "75 %, 3 of 4 (epoch 3)" in found["percent"].description
    assert json.loads(found["table-classes-top-2"].data) == [
        {"class": "a", "n": 1, "n (2)": 2},
        {"class": "b", "n": 3, "n (2)": 4},
    ]
    image = found["image-confusion"]
    assert (image.type, image.data) == (
        "markdown",
        f"![Confusion matrix](data:image/png;base64,{IMAGE})",
    )
    assert image.description == "Confusion matrix"
    link = found["link-weights-best"]
    assert (link.type, link.data) == (
        "markdown",
        "[Weights \\[best\\]](https://wandb.example/run%20%281%29)",
    )
    assert link.description == "Weights [best]: https://wandb.example/run (1)"
    assert found["percent"].description.endswith(": 75 %, 3 of 4 (epoch 3)")
    table = artifacts_of(owner)["dstack-train"].data
    assert "| Checkpoint | /data/step-3.pt (step 3) |" in table
    assert '| Result | {"accuracy": 0.97} |' in table
    (event,) = until(lambda: asset_events(uri), seconds=20)
    assert event["event"] == "prefect.asset.materialization.succeeded"
    assert event["payload"] == {"rows": 3}
    assert any(owner in each["prefect.resource.id"] for each in event["related"])
    log = log_records(UUID(owner), last=" finished")
    assert any("Checkpoint: /data/step-3.pt (step 3)" in line for line in log)
    assert any("asset: expected a URI" in line and "'not a uri'" in line for line in log)
    assert not any("::dstack::" in line for line in log)


def test_each_run_of_a_sweep_has_artifacts_of_its_own(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    losses = [0.4, 0.1, 0.3]

    @flow
    def sweep() -> tuple[Any, list[dict[str, Any]]]:
        tasks = [Task(name="train", commands=[printed({"kind": "metric", "loss": loss})]) for loss in losses]
        return flow_run.id, run_task.map(tasks, unmapped(credentials), **FAST).result()

    owner, outcomes = sweep()
    assert [outcome["metrics"]["loss"] for outcome in outcomes] == losses
    found = artifacts_of(owner)
    for outcome, loss in zip(outcomes, losses, strict=True):
        (row,) = json.loads(found[f"dstack-{outcome['run_name']}-metrics"].data)
        assert (row["name"], row["last"]) == ("loss", loss)
    assert len(runs_of(found)) == 3


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_what_a_failing_run_reported_is_shown(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    ids: list[Any] = []

    @flow
    def failing() -> None:
        ids.append(flow_run.id)
        commands = [printed({"kind": "metric", "loss": 2}), 'echo {} > "$DSTACK_RESULT_FILE"', "exit 3"]
        task.submit({"type": "task", "commands": commands}, credentials, **FAST).result()

    with pytest.raises(RunFailedError) as raised:
        failing()
    assert raised.value.outcome is not None
    assert not raised.value.outcome.has_result
    rows = json.loads(shown_for(ids[0])["metrics"].data)
    assert rows[0] == {"name": "loss", "last": 2, "step": None, "min": 2, "max": 2}


def test_the_result_file_is_the_result_up_to_a_mebibyte(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    size = 900_000

    @flow
    def large() -> dict[str, Any]:
        commands = [f"""printf '"%0{size}d"' 7 > "$DSTACK_RESULT_FILE" """]
        return dict(run_task({"type": "task", "commands": commands}, credentials, **FAST))

    outcome = large()
    assert outcome["result"] == "7".zfill(size)
    # An event of that size would be refused, and others with it.
    ended = until(
        lambda: [e for e in events_of(outcome["run_id"]) if e["event"].endswith("done")], seconds=20
    )
    assert ended[0]["payload"]["result"] is None
    assert ended[0]["payload"]["has_result"]


def test_with_and_without_reports_it_is_the_same_run() -> None:
    given: list[dict[str, Any]] = [{}, {"reports": None}, {"reports": True}, {"reports": False}]
    submissions = [resolve(REPORTING, options, GitLogin()) for options in given]
    assert [each.arguments["reports"] for each in submissions] == [True, True, True, False]
    assert all(each.described == submissions[0].described for each in submissions)


def test_a_run_without_reports_shows_none(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def plain() -> tuple[Any, dict[str, Any]]:
        task = {"type": "task", "name": "plain", "commands": ['echo "file=${DSTACK_RESULT_FILE:-none}"']}
        return flow_run.id, dict(run_task(task, credentials, reports=False, **FAST))

    owner, outcome = plain()
    assert (outcome["has_result"], outcome["result"], outcome["metrics"]) == (False, None, {})
    assert set(artifacts_of(owner)) == {"dstack-plain", "dstack-plain-page", "dstack-plain-progress"}
    assert any("file=none" in line for line in log_records(owner_id(owner), last=" finished"))


def owner_id(value: Any) -> UUID:
    return UUID(str(value))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_run_that_skips_returns_its_reason(
    way: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    skip = printed({"kind": "skip", "reason": "no new data"})
    outcome = way(Task(name="train", commands=[skip]), credentials, **FAST)
    assert outcome["status"] == "done"
    assert outcome["skipped"] == "no new data"


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_what_a_cancelled_run_reports_at_its_end_is_shown(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    ids: list[UUID] = []
    last = printed({"kind": "metric", "loss": 0.125}, {"kind": "checkpoint", "path": "/last.pt"})
    trap = f"trap {shlex.quote(f'{last}; exit 1')} INT"
    saving = Task(name="train", commands=[f"{trap}; echo ready; while :; do sleep 0.05; done"])

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit(saving, credentials, **FAST).wait()

    with cancelled_when(lambda: is_ready(dstack), ids):
        cancelled(return_state=True)
    (row,) = json.loads(shown_for(ids[0])["metrics"].data)
    assert (row["name"], row["last"]) == ("loss", 0.125)
    assert "| Checkpoint | /last.pt |" in artifacts_of(ids[0])["dstack-train"].data


def is_ready(server: LocalServer) -> bool:
    """Return whether the run has set its trap."""
    return any(b"ready" in b"".join(run.logs()) for run in all_runs(server))


def test_a_retried_flow_has_the_same_result_and_no_further_artifacts_or_assets(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    uri = f"s3://bucket/{uuid4()}.pt"
    messages = [{**each, "uri": uri} if each.get("metadata") else each for each in MESSAGES]
    attempts: list[dict[str, Any]] = []
    keys: list[set[str]] = []

    @flow(retries=1, retry_delay_seconds=0)
    def retrying() -> None:
        task = Task(name="train", commands=[printed(*messages)])
        attempts.append(dict(run_task(task, credentials, **FAST)))
        keys.append(set(shown_for(flow_run.id)))
        if len(attempts) == 1:
            raise RuntimeError("something else failed")

    retrying()
    assert attempts[0] == attempts[1]
    assert attempts[1]["result"] == {"accuracy": 0.97}
    assert keys[0] == keys[1] > {"metrics", "percent"}
    # An event that is emitted later is stored after those of the asset.
    marker = f"s3://bucket/{uuid4()}"
    emit_event("test", {"prefect.resource.id": marker})
    until(lambda: asset_events(marker), seconds=20)
    assert len(asset_events(uri)) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_block_and_its_handle_show_and_return_it(
    is_async: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    block = DstackRun(
        credentials=credentials,
        configuration={"type": "task", "name": "train", "commands": [printed(*MESSAGES)]},
        poll_interval=0.1,
    )

    @flow
    def blocked() -> tuple[Any, OutcomeDict]:
        handle = block.trigger()
        handle.wait_for_completion()
        return flow_run.id, handle.fetch_result()

    @flow
    async def ablocked() -> tuple[Any, OutcomeDict]:
        handle = await block.atrigger()
        await handle.await_for_completion()
        return flow_run.id, await handle.afetch_result()

    owner, outcome = asyncio.run(ablocked()) if is_async else blocked()
    assert outcome["result"] == {"accuracy": 0.97}
    assert "metrics" in shown_for(owner)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_result_is_fetched_without_waiting(
    is_async: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = {"type": "task", "name": "train", "commands": [printed(*MESSAGES)]}
    handle = DstackRun(credentials=credentials, configuration=configuration).trigger()
    until(lambda: the_run(dstack).outcome())
    outcome = asyncio.run(handle.afetch_result()) if is_async else handle.fetch_result()
    assert outcome["result"] == {"accuracy": 0.97}


def test_a_run_that_was_submitted_before_is_shown_by_the_task_that_waits(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def waiting() -> tuple[Any, dict[str, Any]]:
        run = submit_run(REPORTING, credentials)
        return flow_run.id, dict(wait_for_run(run, credentials, **FAST))

    owner, outcome = waiting()
    assert outcome["metrics"]["loss"] == 0.5
    assert "image-confusion" in shown_for(owner)


def test_progress_is_shown_while_the_run_is_silent(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(live_artifacts, "_PROGRESS_SECONDS", 0.2)
    ids: list[Any] = []
    first, last = {"kind": "progress", "value": 0.1}, {"kind": "progress", "value": 0.6}
    gate = tmp_path / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.05; done"
    task = Task(name="train", commands=[f"{printed(first, last)}; {wait}"])

    @flow
    def slow() -> None:
        ids.append(flow_run.id)
        future = run_task.submit(task, credentials, poll_interval=0.1)
        until(lambda: percent(ids[0]) == 60.0)
        gate.touch()
        future.wait()

    slow()
    assert percent(ids[0]) == 60.0
    assert all_runs(dstack)[0].outcome() is not None


def percent(owner: Any) -> Any:
    return next((a.data for key, a in artifacts_of(owner).items() if key.endswith("-percent")), None)


# Without a run: what the artifacts do with time, with refusals and with names.


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reported(kind: str, **payload: Any) -> Reported:
    return Reported(Progress("train-1", run_id="1"), kind, payload)


def versions(flow_run_id: Any) -> list[tuple[str, Any]]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    return sorted((item.key or "", item.data) for item in found)


@pytest.fixture
def owner() -> UUID:
    """Return the id of a flow run."""

    @flow
    def owning() -> Any:
        return flow_run.id

    return UUID(str(owning()))


def new_live(owner: UUID, clock: Callable[[], float], **options: Any) -> LiveArtifacts:
    logger = logging.getLogger("live-artifacts-test")
    return LiveArtifacts(
        logger,
        lambda text: text.replace("secret", "***"),
        **{"artifacts": True, "flow_run_id": owner, "clock": clock, **options},
    )


def is_due(live: LiveArtifacts) -> bool:
    return live.is_due


def table_of(name: str, cell: Any = 1) -> Reported:
    return reported("table", name=name, columns=["a"], rows=[[cell]])


def test_only_the_newest_is_written_and_not_too_often(owner: UUID) -> None:
    clock = Clock()
    live = new_live(owner, clock)
    assert not is_due(live)
    for cell in range(1000):
        live.take(table_of("t", cell))
        live.take(reported("metric", step=cell, loss=cell))
    assert is_due(live)
    live.write()
    live.take(table_of("t", 1000))
    live.take(reported("metric", step=1000, loss=1000))
    clock.now += 9.9
    assert not is_due(live)
    clock.now += 0.2
    assert is_due(live)
    live.write()
    assert not is_due(live)
    metrics, first, second = versions(owner)
    assert json.loads(metrics[1])[0] == {"name": "loss", "last": 1000, "step": 1000, "min": 0, "max": 1000}
    assert [first[1], second[1]] == ['[{"a": 1000}]', '[{"a": 999}]']
    live.take(table_of("t", 1001))
    live.write()
    assert len(versions(owner)) == 3
    live.write(everything=True)
    assert len(versions(owner)) == 4


def test_names_of_one_slug_and_secrets(owner: UUID) -> None:
    live = new_live(owner, Clock())
    live.take(table_of("val/loss", ["secret", {"secret": "a secret"}]))
    live.take(table_of("val loss"))
    live.take(table_of("学習"))
    live.take(reported("progress", value=0.5, text="secret"))
    live.write()
    found = dict(versions(owner))
    assert found["dstack-train-1-table-val-loss"] == '[{"a": ["***", {"***": "a ***"}]}]'
    assert set(found) > {"dstack-train-1-table-table"}
    assert sum(key.startswith("dstack-train-1-table-val-loss-") for key in found) == 1
    assert not any("secret" in str(data) for data in found.values())


def test_a_flood_of_names_is_cut(owner: UUID, caplog: pytest.LogCaptureFixture) -> None:
    live = new_live(owner, Clock())
    for number in range(130):
        live.take(table_of(f"t{number}"))
    live.take(table_of("t1", 7))
    live.take(reported("metric", loss=1))
    live.write()
    found = dict(versions(owner))
    assert len(found) == 101
    assert found["dstack-train-1-table-t1"] == '[{"a": 7}]'
    assert sum("more than 100 artifacts" in record.message for record in caplog.records) == 1


def test_an_unreachable_server_loses_nothing_and_a_refusal_only_what_is_refused(
    owner: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    live = new_live(owner, clock)
    create = _report.create_artifact
    failures: list[Exception] = [httpx.ConnectError("down"), refusal(503), refusal(422)]

    def failing(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop(0)
        return create(*args, **options)

    monkeypatch.setattr(live_artifacts, "create_artifact", failing)
    live.take(table_of("a"))
    live.take(table_of("b"))
    for _ in range(2):
        live.write()
        assert not is_due(live)
        clock.now += 10
        assert is_due(live)
    live.write()
    assert [key for key, _ in versions(owner)] == ["dstack-train-1-table-b"]


def refusal(status: int) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://prefect")
    return PrefectHTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


def test_an_artifact_that_was_deleted_is_made_again(owner: UUID) -> None:
    clock = Clock()
    live = new_live(owner, clock)
    live.take(reported("progress", value=0.5))
    live.write()
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[owner]))
        )
        client.delete_artifact(found.id)
    live.take(reported("progress", value=0.75))
    for _ in range(2):
        clock.now += 2
        assert is_due(live)
        live.write()
    assert not is_due(live)
    assert versions(owner) == [("dstack-train-1-percent", 75.0)]


def test_without_artifacts_only_the_rest_is_remembered(owner: UUID) -> None:
    live = new_live(owner, Clock(), artifacts=False)
    for event in (table_of("t"), reported("metric", loss=1), reported("progress", value=1)):
        live.take(event)
    live.take(reported("checkpoint", path="/a"))
    live.take(reported("skip", reason=""))
    assert not is_due(live)
    live.write(everything=True)
    assert versions(owner) == []
    assert (live.checkpoint, live.skipped) == ("/a", "no reason given")


def test_an_asset_is_one_event_however_often_the_run_is_followed(owner: UUID) -> None:
    uri = f"s3://bucket/{uuid4()}"
    for _ in range(2):
        live = new_live(owner, Clock())
        live.take(reported("asset", uri=uri, metadata={"rows": 1}))
        assert is_due(live)
        live.write()
    live = new_live(owner, Clock())
    live.take(reported("asset", uri=uri, metadata={"rows": 2}))
    live.write()
    found = until(lambda: events if len(events := asset_events(uri)) >= 2 else [], seconds=20)
    assert sorted(event["payload"]["rows"] for event in found) == [1, 2]


def test_secrets_in_a_result_are_replaced(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def secretive() -> dict[str, Any]:
        command = """echo '{"word": "'$WORD_TOKEN'", "kept": 1}' > $DSTACK_RESULT_FILE"""
        outcome: dict[str, Any] = run_task(
            {"type": "task", "commands": [command]}, credentials, env={"WORD_TOKEN": "open-sesame-77"}, **FAST
        )
        return outcome

    outcome: Any = secretive()
    assert outcome["result"] == {"word": "***", "kept": 1}
