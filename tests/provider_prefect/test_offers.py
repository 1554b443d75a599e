"""The wait for a machine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect import flow

import dstack_core as core
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, await_for_offer, wait_for_offer
from prefect_dstack.offers import _Search

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_cheapest_machine_is_returned(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def waiting() -> dict[str, Any]:
        return wait_for_offer("24GB..", credentials, max_price=5.0)

    offer = waiting()
    assert (offer["backend"], offer["gpu"]) == ("remote", "A100")
    assert 0 < offer["price_per_hour"] <= 5


def test_the_async_task_ends_when_time_is_up(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def waiting() -> None:
        await await_for_offer("24GB..", credentials, max_price=0.01, timeout=3.0, poll_interval=0.1)

    with pytest.raises(
        core.WaitTimeoutError, match=r"within 3 s \(24GB\.\., max_price=0\.01\)\. Ask for less"
    ):
        asyncio.run(waiting())
    assert sum(request.path.endswith("/runs/get_plan") for request in dstack.requests) >= 2


def offers(*availability: str) -> core.Offers:
    made = [core.Offer("aws", "eu", f"type-{one}", 1.0, False, one, "H100", 1) for one in availability]
    return core.Offers(tuple(made), len(made))


def test_a_machine_that_is_not_to_be_had_is_passed_over() -> None:
    search = _Search("H100", {}, 60.0, 5.0)
    assert search.take(offers("not_available", "no_quota")) == 5.0
    assert search.take(offers()) == 5.0
    assert search.take(offers("no_quota", "unknown")) is None
    assert search.found["instance"] == "type-unknown"


@pytest.mark.parametrize("given", [{"timeout": 0}, {"poll_interval": 0}, {"max_price": -1}])
def test_wrong_values_are_refused(given: dict[str, Any], credentials: DstackCredentials) -> None:
    @flow
    def waiting() -> None:
        wait_for_offer(None, credentials, **given)

    with pytest.raises(core.ConfigurationError):
        waiting()
