"""A failure is reported once in a task's log, whichever way the task waited."""

from __future__ import annotations

import json

import pytest

from tests.provider_airflow.components import Components

pytestmark = pytest.mark.slow

_FAILS = "echo the-last-words; sleep 7; exit 3"


def text_of(components: Components, dag_id: str, dag_run: str) -> str:
    records = components.log(dag_id, dag_run)
    return "\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize("dag_id", ["sync", "deferred"])
def test_the_last_lines_of_a_failed_run_are_in_its_log_once(components: Components, dag_id: str) -> None:
    dag_run = components.trigger(dag_id, command=_FAILS)
    components.wait_for_state(dag_id, dag_run, "failed")
    text = text_of(components, dag_id, dag_run)
    assert text.count("the-last-words") == 1
    assert text.count("DstackUserError") == 1


@pytest.mark.parametrize("dag_id", ["bad_sync", "bad_deferred"])
def test_a_wrong_input_is_reported_once(components: Components, dag_id: str) -> None:
    dag_run = components.trigger(dag_id, price="no-price")
    components.wait_for_state(dag_id, dag_run, "failed")
    assert text_of(components, dag_id, dag_run).count("max_price") == 1
