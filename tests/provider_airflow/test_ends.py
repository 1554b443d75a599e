"""Every end of a run in a task's log is one line with time and cost, and all that Airflow has agrees on why."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from airflow_provider_dstack.errors import DstackRunError
from airflow_provider_dstack.links import OUTCOME_KEY
from airflow_provider_dstack.services import DstackStopRunOperator
from dstack_core.integration import describe_outcome
from dstack_core.local import LocalServer
from tests.provider_airflow.test_outcome_xcom import Pushes, by_operator, by_service
from tests.provider_airflow.test_remaining_log import worker_log  # noqa: F401
from tests.provider_airflow.test_trigger_relay import Log, log, xcoms  # noqa: F401
from tests.provider_airflow.triggering import payloads, submitted, trigger_for


def end_line(server: LocalServer) -> str:
    with server.client() as client:
        (run,) = client.runs.list(all=True)
        outcome = run.outcome()
    assert outcome is not None
    return describe_outcome(outcome)


@pytest.mark.parametrize(
    ("command", "category"),
    [("kill -9 $$", "user.killed"), ("sh -c 'kill -9 $$'; exit", "user.out_of_memory")],
)
@pytest.mark.parametrize("way", [by_operator, by_service], ids=lambda way: way.__name__)
def test_a_waiting_task_logs_one_end_and_its_error_and_xcom_have_its_category(
    way: Any,
    command: str,
    category: str,
    server: LocalServer,
    worker_log: Log,  # noqa: F811
) -> None:
    context: Any = Pushes()
    with pytest.raises(DstackRunError) as caught:
        way(command).execute(context)
    assert worker_log.lines.count(end_line(server)) == 1
    outcome = context.pushed[OUTCOME_KEY]
    assert outcome["category"] == caught.value.outcome["category"] == category
    assert f"({category})" in str(caught.value)


@pytest.mark.parametrize("command", ["kill -9 $$", "true"])
def test_a_deferred_task_logs_one_end_and_its_event_error_and_xcom_have_its_category(
    command: str,
    server: LocalServer,
    xcoms: dict[str, Any],  # noqa: F811
    log: Log,  # noqa: F811
    worker_log: Log,  # noqa: F811
) -> None:
    run = submitted(server, f"echo the-last-words; {command}")
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run))))
    # As Airflow's database returns it.
    payload = json.loads(json.dumps(payload))
    context: Any = Pushes()
    task = by_operator(command)
    if command == "true":
        task.execute_complete(context, payload)
    else:
        with pytest.raises(DstackRunError, match=r"\(user.killed\)") as caught:
            task.execute_complete(context, payload)
        assert "the-last-words" not in str(caught.value)
        categories = {each["category"] for each in (payload["outcome"], context.pushed[OUTCOME_KEY])}
        assert categories == {caught.value.outcome["category"]} == {"user.killed"}
    lines = [*log.lines, *worker_log.lines]
    assert lines.count(end_line(server)) == 1
    assert lines.count("the-last-words") == 1


def test_a_task_that_stops_a_run_logs_its_end(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submitted(server, "sleep 600")
    seen = Log()
    task = DstackStopRunOperator(task_id="stop", run_name=run.name, poll_interval=0.1)
    monkeypatch.setattr(DstackStopRunOperator, "log", seen.logger())
    context: Any = Pushes()
    task.execute(context)
    assert seen.lines.count(end_line(server)) == 1
