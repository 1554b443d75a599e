"""What a run reports reaches Airflow exactly once, whichever process receives it, at a bounded rate."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _run_reports, _trigger_relay, triggers
from airflow_provider_dstack._log_relay import LogPosition, new_relay, position_in, records
from airflow_provider_dstack._run_reports import (
    SECONDS_BETWEEN,
    ReportPusher,
    RunReports,
    StatePusher,
    describe_outlets,
    push_reports,
)
from airflow_provider_dstack._trigger_relay import TriggerRelay
from airflow_provider_dstack.decorators import DstackDecoratedOperator
from airflow_provider_dstack.errors import DstackError, DstackRunFailed
from airflow_provider_dstack.services import DstackServiceOperator
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import Reported, Run
from dstack_core.local import LocalServer
from tests.provider_airflow.test_operator import CONTEXT, operator
from tests.provider_airflow.test_relay import OUTCOME, PROGRESS
from tests.provider_airflow.test_results import message
from tests.provider_airflow.test_trigger_relay import Log
from tests.provider_airflow.triggering import payloads, submitted, trigger_for, until

TI: Any = SimpleNamespace(dag_id="d", run_id="r", task_id="train", try_number=1, map_index=-1)
LOG = logging.getLogger("test")


def reported(kind: str, **payload: Any) -> Reported:
    return Reported(PROGRESS, kind, payload)


def taken(*events: Reported, reports: RunReports | None = None) -> RunReports:
    reports = reports or RunReports()
    for event in events:
        list(reports.take(event))
    return reports


class XComs(dict[str, Any]):
    """The XComs of a task, and the keys in the order in which they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.pushes: list[str] = []

    def push(self, ti: object, key: str, value: Any) -> None:
        self[key] = json.loads(json.dumps(value))
        self.pushes.append(key)


@pytest.fixture
def xcoms(monkeypatch: pytest.MonkeyPatch) -> XComs:
    kept = XComs()
    for module in (_trigger_relay, _run_reports):
        monkeypatch.setattr(module, "push_xcom", kept.push)
    monkeypatch.setattr(_trigger_relay, "pull_xcom", lambda ti, key: kept.get(key))
    return kept


@pytest.fixture
def log() -> Log:
    return Log()


def test_the_last_value_of_each_thing_is_kept() -> None:
    reports = taken(
        reported("metric", loss=0.5, step=1),
        reported("metric", loss="nan", lr=1.0, step=2),
        reported("link", url="https://a", text="first"),
        reported("link", url="https://b"),
        reported("link", url="https://a", text="again"),
        reported("asset", uri="s3://a", metadata={"rows": 1}),
        reported("asset", uri="s3://a"),
        reported("checkpoint", path="1.pt"),
        reported("checkpoint", path="2.pt", step=2),
        reported("progress", value=0.5),
        reported("something-new", value=1),
    )
    assert reports.xcoms() == {
        "dstack_metrics": {"loss": {"value": "nan", "step": 2}, "lr": {"value": 1.0, "step": 2}},
        "dstack_links": [{"url": "https://b", "text": None}, {"url": "https://a", "text": "again"}],
        "dstack_assets": [{"uri": "s3://a", "metadata": None}],
        "dstack_checkpoint": {"path": "2.pt", "step": 2},
    }


def test_each_address_is_a_line_of_the_log_once_and_a_hundred_at_most() -> None:
    reports = RunReports(mask=lambda text: text.replace("hunter22", "***"))
    messages = [
        reported("link", url="https://a/hunter22", text="Curves\nof loss"),
        reported("link", url="https://b"),
        reported("link", url="https://b", text="again"),
        *(reported("link", url=f"https://{n}") for n in range(300)),
    ]
    lines = [line for message in messages for _, line in reports.take(message)]
    assert lines[:2] == ["Link: Curves of loss: https://a/***", "Link: https://b"]
    assert len(lines) == 100


def test_what_is_kept_is_bounded() -> None:
    flood = [
        *(reported("metric", **{f"m{n}": n for n in range(900)}) for _ in range(2)),
        reported("metric", **{f"n{n}": n for n in range(900)}),
        *(reported("link", url=f"https://{n}") for n in range(300)),
        reported("link", url="https://" + "x" * 10_000),
        reported("asset", uri="s3://large", metadata={"text": "x" * 10_000}),
        reported("checkpoint", path="1.pt", metadata={"text": "x" * 10_000}),
        *(reported("table", name=f"t{n}", columns=["a"], rows=[["x" * 300]] * 150) for n in range(10)),
        reported("table", name="wide", columns=["a"], rows=[["x" * 10_000]] * 20),
    ]
    found = taken(*flood).xcoms()
    assert len(found["dstack_metrics"]) == 1000
    assert [link["url"] for link in found["dstack_links"]] == [f"https://{n}" for n in range(200, 300)]
    assert found["dstack_assets"] == [{"uri": "s3://large", "metadata": None}]
    assert found["dstack_checkpoint"] == {"path": "1.pt", "metadata": None}
    tables = found["dstack_tables"]
    assert len(json.dumps(tables)) <= 64 * 1024
    assert (len(tables["wide"]["rows"]), tables["wide"]["rows_left_out"]) == (5, 15)
    (other,) = (table for name, table in taken(*flood[:-1]).xcoms()["dstack_tables"].items() if name == "t9")
    assert (len(other["rows"]), other["rows_left_out"]) == (100, 50)


def test_another_process_continues_with_the_state() -> None:
    first = taken(
        reported("metric", loss=0.5),
        reported("link", url="https://a"),
        reported("table", name="keys", columns=["key"], rows=[["swordfish"]]),
        reported("asset", uri="s3://a", metadata={"by": ["swordfish"]}),
        reported("skip", reason="the secret is swordfish"),
        reported("image", name="plot", png=""),
        reports=RunReports(mask=lambda text: text.replace("swordfish", "***")),
    )
    state = json.loads(json.dumps(first.state()))
    second = taken(reported("link", url="https://b"), reports=RunReports(state))
    assert second.skip == "the secret is ***"
    assert "swordfish" not in str(state)
    assert second.assets == [{"uri": "s3://a", "metadata": {"by": ["***"]}}]
    assert second.changes() == {
        "dstack_links": [{"url": "https://a", "text": None}, {"url": "https://b", "text": None}]
    }
    assert second.xcoms()["dstack_metrics"] == {"loss": {"value": 0.5, "step": None}}
    assert list(second.take(reported("image", name="plot", png=""))) == []
    # Received again, messages replace themselves.
    assert taken(reported("link", url="https://b"), reports=second).xcoms() == second.xcoms()


def test_changes_are_returned_once_and_later_messages_do_not_change_them() -> None:
    reports = taken(reported("metric", loss=0.5))
    first = reports.changes()
    assert reports.changes() == {}
    taken(reported("metric", loss=0.4), reports=reports)
    assert first == {"dstack_metrics": {"loss": {"value": 0.5, "step": None}}}
    reports.not_pushed(first)
    assert reports.changes() == {"dstack_metrics": {"loss": {"value": 0.4, "step": None}}}


def test_a_push_that_fails_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, xcoms: XComs, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(ti: object, key: str, value: Any) -> None:
        raise OSError("no database")

    reports = taken(reported("metric", loss=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(_run_reports, "push_xcom", refuse)
        push_reports(TI, reports.changes(), reports, LOG)
    assert "Could not write the XComs dstack_metrics: OSError('no database')." in caplog.text
    push_reports(TI, reports.changes(), reports, LOG)
    assert list(xcoms) == ["dstack_metrics"]


def test_a_triggerer_pushes_what_is_new_in_the_state_that_is_saved(
    monkeypatch: pytest.MonkeyPatch, xcoms: XComs, caplog: pytest.LogCaptureFixture
) -> None:
    now, reports = [100.0], taken(reported("metric", loss=0.5))
    pusher = StatePusher(LOG, lambda: now[0])
    pusher.push(TI, reports.state())
    assert xcoms == {"dstack_metrics": {"loss": {"value": 0.5, "step": None}}}
    taken(reported("link", url="https://a"), reports=reports)
    pusher.push(TI, reports.state())
    assert xcoms.pushes == ["dstack_metrics"]
    now[0] += SECONDS_BETWEEN
    pusher.push(TI, reports.state())
    assert xcoms.pushes == ["dstack_metrics", "dstack_links"]

    def refuse(ti: object, key: str, value: Any) -> None:
        raise OSError("no database")

    taken(reported("metric", loss=0.4), reported("link", url="https://b"), reports=reports)
    pusher.hurry()
    with monkeypatch.context() as patch:
        patch.setattr(_run_reports, "push_xcom", refuse)
        pusher.push(TI, reports.state())
    assert "Could not write the XComs dstack_metrics, dstack_links: OSError('no database')." in caplog.text
    pusher.push(TI, reports.state())
    pusher.push(TI, reports.state())
    assert xcoms.pushes[2:] == ["dstack_metrics", "dstack_links"]
    assert urls(xcoms) == ["a", "b"]


def test_a_worker_pushes_every_ten_seconds_at_most_and_at_the_end() -> None:
    now, reports = [100.0], RunReports()
    pushed: list[Any] = []
    pusher = ReportPusher(lambda changes, reports: pushed.append(dict(changes)), lambda: now[0])
    for step in range(1000):
        taken(reported("metric", loss=step), reports=reports)
        pusher.offer(reports)
        now[0] += 0.1
    pusher.offer(reports, last=True)
    pusher.offer(reports, last=True)
    losses = [each["dstack_metrics"]["loss"]["value"] for each in pushed]
    assert losses[0] == 0
    assert losses[-1] == 999
    assert len(losses) == 100 / SECONDS_BETWEEN + 1


def test_the_position_moves_behind_each_message_and_a_state_is_new_with_it() -> None:
    position = LogPosition(PROGRESS, {"job": 3})
    first = position.to_dict()
    cursor = PROGRESS.cursor("job")
    moved = PROGRESS.with_cursor("job", type(cursor)(reported=1))
    position.passed(Reported(moved, "metric", {"loss": 1}))
    assert position.progress == moved
    # Messages precede the lines of their page, so the lines that were relayed are still those.
    assert position.to_dict()["ahead"] == {"job": 3}
    assert position_in(first) != position_in(position.to_dict())


def test_a_message_is_not_a_log_line() -> None:
    assert list(records(new_relay(), reported("metric", loss=1.0), RunReports())) == []
    texts = [text for _, text in records(new_relay(), reported("progress", value=0.5), RunReports())]
    assert texts == ["Progress: 50 %"]


def steps(first: int, last: int) -> str:
    """Return commands that report as many metrics and links, with a line after each."""
    text = '::dstack::{"kind": "%s"}'
    metric = text % 'metric", "step": \'$i\', "loss": \'$i\', "x": "nan'
    link = text % 'link", "url": "https://\'$i\''
    return f"for i in $(seq {first} {last}); do echo '{metric}'; echo '{link}'; echo line-$i; done"


def urls(state: Any) -> list[str]:
    return [link["url"].removeprefix("https://") for link in state["dstack_links"]]


def saw(events: list[Reported], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note every message that any process receives."""
    take = RunReports.take

    def noted(self: RunReports, event: Reported) -> Any:
        events.append(event)
        return take(self, event)

    monkeypatch.setattr(RunReports, "take", noted)


def test_a_trigger_that_takes_over_receives_each_message_once(
    server: LocalServer, xcoms: XComs, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, seen = tmp_path / "gate", list[Reported]()
    saw(seen, monkeypatch)
    run = submitted(server, f"{steps(1, 20)}; until [ -e {gate} ]; do sleep 0.1; done; {steps(21, 40)}")
    first = log.of(trigger_for(run))
    arguments = json.loads(json.dumps(first.serialize()[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trigger_relay, "SECONDS_BETWEEN", 0.0)
        patch.setattr(_run_reports, "SECONDS_BETWEEN", 0.0)
        asyncio.run(
            until(first, lambda: xcoms.get("dstack_progress", {}).get("tail", [])[-1:] == ["line-20"])
        )
    # What was pushed is not behind what was saved.
    assert urls(xcoms) == urls(xcoms["dstack_progress"]["reported"]) == [str(n) for n in range(1, 21)]
    gate.touch()
    second = log.of(DstackRunTrigger(**arguments))
    second.task_instance = first.task_instance
    (payload,) = asyncio.run(payloads(second))
    numbers = [event.payload["step"] for event in seen if event.kind == "metric"]
    assert numbers == list(range(1, 41))
    assert urls(payload["reported"]) == [str(n) for n in range(1, 41)]
    assert payload["outcome"]["metrics"]["loss"] == 40.0
    assert [line for line in log.lines if line.startswith("line-")] == [f"line-{n}" for n in range(1, 41)]


@pytest.mark.parametrize("after", [1, 15, 40])
def test_any_saved_position_continues_behind_its_messages(
    server: LocalServer, xcoms: XComs, log: Log, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The trigger ends in the middle of a page; all messages of a page precede its lines."""
    seen = list[Reported]()
    saw(seen, monkeypatch)
    run = ended(server, steps(1, 20))
    states: list[Any] = []

    class Stopping(TriggerRelay):
        async def write(self, event: Any, log: Any) -> bool:
            if len(seen) >= after:
                states.append(json.loads(json.dumps(self.state())))
                raise asyncio.CancelledError
            return await super().write(event, log)

    with monkeypatch.context() as patch:
        patch.setattr(triggers, "TriggerRelay", Stopping)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(payloads(log.of(trigger_for(run))))
    xcoms["dstack_progress"] = {"marker": "ours", **states[0]}
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run))))
    assert [event.payload["step"] for event in seen if event.kind == "metric"] == list(range(1, 21))
    assert urls(payload["reported"]) == [str(n) for n in range(1, 21)]
    assert [line for line in log.lines if line.startswith("line-")] == [f"line-{n}" for n in range(1, 21)]


def test_a_trigger_pushes_with_its_position(server: LocalServer, xcoms: XComs, log: Log) -> None:
    asyncio.run(payloads(log.of(trigger_for(ended(server, steps(1, 300))))))
    # A save before the first pause, and one of the end.
    assert xcoms.pushes.count("dstack_metrics") <= 2
    assert xcoms.pushes.count("dstack_progress") <= 2
    assert xcoms["dstack_metrics"]["loss"] == {"value": 300, "step": 300}


def ended(server: LocalServer, command: str, **options: Any) -> Run:
    run = server.client().runs.submit(
        {"type": "task", "commands": [command]}, run_name="deferred", marker="ours", **options
    )
    run.wait(60, poll_interval=0.1)
    return run


_FLOOD = "awk 'BEGIN { for (i = 0; i < 12000; i++) printf \"%0100d\\n\", i }'"


@pytest.fixture
def fire_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of the rate limit stand still: a trigger that is held up would wait forever."""
    monkeypatch.setattr(triggers, "TriggerRelay", partial(TriggerRelay, clock=lambda: 1000.0))


@pytest.mark.usefixtures("fire_early")
class TestHeldUp:
    """The trigger fires before it has read the whole log; the worker reads the rest."""

    @staticmethod
    def fired(server: LocalServer, log: Log, command: str) -> Any:
        run = ended(server, command, reports=True)
        (payload,) = asyncio.run(payloads(log.of(trigger_for(run, log_budget_bytes=None))))
        assert "rest" in payload
        assert "reported" not in payload
        return json.loads(json.dumps(payload))

    @pytest.mark.parametrize("returns", ["result", "outcome"])
    def test_the_worker_gets_the_result_and_each_message_once(
        self, server: LocalServer, xcoms: XComs, log: Log, monkeypatch: pytest.MonkeyPatch, returns: Any
    ) -> None:
        seen = list[Reported]()
        saw(seen, monkeypatch)
        payload = self.fired(
            server, log, f"{steps(1, 5)}; {_FLOOD}; {steps(6, 10)}; echo '[1]' > $DSTACK_RESULT_FILE"
        )
        assert payload["outcome"]["has_result"] is False
        result = operator(returns=returns, log_budget_bytes=None).execute_complete(CONTEXT, payload)
        outcome = {"result": result} if returns == "result" else result
        assert outcome["result"] == [1]
        assert outcome.get("has_result", True) is True
        assert outcome.get("metrics", {"loss": 10.0})["loss"] == 10.0
        assert [event.payload["step"] for event in seen if event.kind == "metric"] == list(range(1, 11))
        assert urls(xcoms) == [str(n) for n in range(1, 11)]

    def test_a_result_that_cannot_be_read_is_left_to_the_next_try(
        self, server: LocalServer, xcoms: XComs, log: Log
    ) -> None:
        payload = self.fired(server, log, f"{steps(1, 5)}; {_FLOOD}; echo 1 > $DSTACK_RESULT_FILE")
        # As if the result were in a page that the trigger had not read.
        payload["rest"]["progress"]["reported"]["results"] = []
        server.faults.add("/logs/poll", times=None, status=503)
        store: Any = SimpleNamespace(delete=lambda key: pytest.fail("forgot the run"), get=lambda key: None)
        context: Any = {**CONTEXT, "task_state_store": store}
        with pytest.raises(DstackError, match="Could not read the result of run deferred in its log"):
            operator(returns="result", retry_budget=0.3).execute_complete(context, payload)
        outcome = operator(retry_budget=0.3, durable=False).execute_complete(CONTEXT, payload)
        assert (outcome["has_result"], outcome["status"]) == (False, "done")
        assert outcome["metrics"]["loss"] == 5.0

    def test_a_failed_run_is_reported_as_such(self, server: LocalServer, xcoms: XComs, log: Log) -> None:
        payload = self.fired(server, log, f"{steps(1, 5)}; {_FLOOD}; exit 3")
        server.faults.add("/logs/poll", times=None, status=503)
        with pytest.raises(DstackRunFailed, match="status 3"):
            operator(returns="result", retry_budget=0.3).execute_complete(CONTEXT, payload)


def test_a_page_of_messages_alone_can_be_left_to_the_worker() -> None:
    """A trigger that is held up among messages fires behind the last one that it received."""

    async def go() -> None:
        position = LogPosition(PROGRESS, {})
        checkpoints: Any = SimpleNamespace(offer=lambda state: True, close=lambda: None)
        relay = TriggerRelay(new_relay(), position, checkpoints, _ended, clock=lambda: 0.0)
        for number in range(1, 100_000):
            moved = PROGRESS.with_cursor("job", type(PROGRESS.cursor("job"))(reported=number))
            event = Reported(moved, "metric", {"loss": number})
            if not await relay.write(event, LOG):
                break
        assert relay.outcome == OUTCOME
        assert relay.state()["progress"]["cursors"]["job"]["reported"] == number
        assert relay.state()["reported"]["dstack_metrics"]["loss"]["value"] == number
        await relay.close()

    asyncio.run(go())


async def _ended() -> Any:
    return OUTCOME


def test_limits_reach_every_process(server: LocalServer, xcoms: XComs, log: Log) -> None:
    run = ended(server, message("link", url="https://" + "x" * 200) + "; " + message("link", url="https://a"))
    trigger = log.of(trigger_for(run, max_report_bytes=100, max_reports_per_second=5))
    assert trigger.serialize()[1]["max_reports_per_second"] == 5
    (payload,) = asyncio.run(payloads(trigger))
    assert urls(payload["reported"]) == ["a"]
    assert any("The run reported more in one message than is kept" in line for line in log.lines)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: operator(returns="log"), "returns: expected one of 'outcome', 'result', got 'log'"),
        (lambda: operator(returns="result", get_logs=False), r"expected get_logs=True, got False"),
        (lambda: operator(max_report_bytes=1), "max_report_bytes: expected a whole number from 64 on"),
        (lambda: operator(max_reports_per_second=True), "max_reports_per_second: expected a whole number"),
        (
            lambda: DstackServiceOperator(task_id="s", configuration={}, returns="result"),
            "returns: expected \"outcome\", got 'result'. A service reports no result.",
        ),
        (
            lambda: DstackDecoratedOperator(
                task_id="s", python_callable=lambda: None, op_args=(), op_kwargs={}, returns="result"
            ),
            "The task returns what the function returned.",
        ),
    ],
)
def test_wrong_arguments_are_reported_when_the_dag_is_parsed(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_what_a_dag_sets_for_an_asset_is_kept_and_large_values_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asset, alias = SimpleNamespace(uri="s3://a/b/"), SimpleNamespace(name="alias")
    event = SimpleNamespace(extra={"url": "mine"})
    outcome = replace(
        OUTCOME, has_result=True, result="x" * 10_000, metrics={f"m{n}": 1.0 for n in range(1000)}
    )
    reports = taken(reported("asset", uri="s3://a/b", metadata={"rows": 3}))
    context: Any = {"outlet_events": _ById({id(asset): event})}
    describe_outlets(context, [asset, alias], outcome, reports, LOG)
    assert event.extra == {"url": "mine", "run_name": "af-1", "metadata": {"rows": 3}}
    describe_outlets({"outlet_events": {}}, [SimpleNamespace(uri="s3://c")], outcome, reports, LOG)  # type: ignore[typeddict-item]
    assert "Could not describe the asset s3://c" in caplog.text


class _ById(dict[int, Any]):
    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(id(key))
