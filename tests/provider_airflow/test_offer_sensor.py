"""The sensor of offers: what it waits for, in the worker and in the triggerer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from airflow.sdk import PokeReturnValue
from airflow.sdk.exceptions import TaskDeferred

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack.offer_sensor import DstackOfferSensor
from airflow_provider_dstack.offer_trigger import DstackOfferTrigger, first_offer
from dstack_core import Offer, Offers
from dstack_core.local import LocalServer
from tests.provider_airflow.support import connection_json, paths

PRICES = {"aws/us-east-1": 1.2, "gcp/us-west1": 0.9}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    with LocalServer(regions=PRICES) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        yield server


def sensor(**options: Any) -> DstackOfferSensor:
    return DstackOfferSensor(task_id="wait", **options)


def found(result: Any) -> dict[str, Any]:
    assert isinstance(result, PokeReturnValue)
    assert isinstance(result.xcom_value, dict)
    return result.xcom_value


def test_the_cheapest_machine_is_found_below_the_price(server: LocalServer) -> None:
    best = found(sensor(run_resources={"gpu": "1"}, max_price="1.0").poke({}))
    assert (best["backend"], best["region"], best["price_per_hour"]) == ("gcp", "us-west1", 0.9)
    assert json.loads(json.dumps(best)) == best
    assert found(sensor(regions=["us-east-1"]).poke({}))["price_per_hour"] == 1.2
    assert sensor(max_price=0.5).poke({}) is False
    assert sensor(run_resources={"gpu": "99"}).poke({}) is False


def test_a_machine_that_cannot_be_had_is_left_out() -> None:
    offers = [Offer("aws", "r", "x", price, False, word) for price, word in [(1, "no_quota"), (2, None)]]
    best = first_offer(Offers(tuple(offers), 2))
    assert best is not None
    assert best["price_per_hour"] == 2
    assert first_offer(Offers(tuple(offers[:1]), 1)) is None


def test_a_server_that_is_away_is_polled_again(server: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    server.faults.add("/runs/get_plan", status=503)
    assert sensor().poke({}) is False
    assert found(sensor().poke({}))


def test_wrong_input_fails_at_once(server: LocalServer) -> None:
    with pytest.raises(AirflowFailException, match="max_price"):
        sensor(max_price="cheap").poke({})


def test_the_triggerer_polls_until_there_is_a_machine(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = sensor(max_price=1.0, deferrable=True, poke_interval=0.4)
    assert task.execute({})["region"] == "us-west1"
    monkeypatch.setattr(task, "poke", lambda context: False)
    with pytest.raises(TaskDeferred) as caught:
        task.execute({})
    path, arguments = caught.value.trigger.serialize()
    assert path == f"{DstackOfferTrigger.__module__}.{DstackOfferTrigger.__name__}"
    server.faults.add("/runs/get_plan", status=503)

    async def all_of_them() -> list[dict[str, Any]]:
        triggers = [DstackOfferTrigger(**json.loads(json.dumps(arguments))) for _ in range(10)]
        return [event.payload for event in await asyncio.gather(*(anext(one.run()) for one in triggers))]

    before = len(paths(server, "/runs/get_plan"))
    events = asyncio.run(all_of_them())
    assert [event["offer"]["region"] for event in events] == ["us-west1"] * 10
    # Ten triggers share each poll; those of a refused one ask alone.
    assert len(paths(server, "/runs/get_plan")) - before <= 12
    assert task.execute_complete({}, events[0])["price_per_hour"] == 0.9


def test_what_a_trigger_reports_as_broken_fails_the_task(server: LocalServer) -> None:
    trigger = DstackOfferTrigger(
        dstack_conn_id="none", project_name=None, wanted={"limit": 5}, poll_interval=0.1
    )

    async def first() -> dict[str, Any]:
        payload: dict[str, Any] = (await anext(trigger.run())).payload
        return payload

    with pytest.raises(AirflowFailException, match="dstack_conn_id"):
        sensor().execute_complete({}, asyncio.run(first()))
