"""A budget that several runs share: what is spent and reserved, and whether one more fits."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.integration import BudgetSpentError, BudgetState, aread_budget, read_budget
from dstack_core.local import LocalServer, VirtualTime

OWNER = "airflow:train/manual__1/"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """Return a server with runs of the owner: one that ended, one that was replaced, and an active one."""
    with VirtualTime(), LocalServer(price=36.0) as server, server.client() as client:
        for _ in range(2):
            marker = f"{OWNER}fit/1of1#abcdef"
            task = dstack.Task(commands=["sleep 100"])
            if found := client.runs.get("fit"):
                assert not found.last_status.is_active
                marker = f"{OWNER}fit/2of2#abcdef"
            client.runs.submit(task, "fit", marker=marker).wait()
        client.runs.submit(
            dstack.Task(commands=["sleep 100"]), "other", marker="airflow:train/manual__2/x"
        ).wait()
        active = dstack.Task(commands=["sleep 100000"])
        client.runs.submit(active, "active", marker=f"{OWNER}more/1of1#abcdef", max_cost=3)
        yield server


def test_what_is_spent_and_reserved_is_known_from_the_server(server: LocalServer) -> None:
    with server.client() as client:
        state = read_budget(client, 10, marker_prefix=OWNER, planned="4.5")
        since = datetime.now(UTC) - timedelta(days=1)
        assert read_budget(client, 10, marker_prefix=OWNER, since=since).runs == 3
    assert state.runs == 3
    assert Decimal(2) <= state.spent < 3
    # What the active run has cost is spent, what it may still cost is reserved.
    assert Decimal(5) <= state.spent + state.reserved < Decimal("5.9")
    assert state.fits
    assert "Of the budget of 10.00 USD, 2." in state.text
    assert "are spent by 3 runs, " in state.text
    assert "are reserved for active ones, and the next run may cost 4.50 USD." in state.text

    async def work() -> BudgetState:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            return await aread_budget(client, 10, marker_prefix=OWNER, planned=6)

    state = asyncio.run(work())
    assert not state.fits
    with pytest.raises(BudgetSpentError, match="Raise the budget") as raised:
        state.raise_for_status()
    assert copy.copy(raised.value).state == state


@pytest.mark.parametrize(
    ("spent", "reserved", "planned", "fits"),
    [
        ("0", "0", "10", True),
        ("0", "0", "10.0001", False),
        ("9.9999", "0", "0", True),
        ("10", "0", "0", False),
        ("4", "3", "3", True),
        ("4", "3", "3.01", False),
        ("12", "0", "0", False),
    ],
)
def test_a_run_fits_up_to_the_last_cent(spent: str, reserved: str, planned: str, fits: bool) -> None:
    state = BudgetState(Decimal(10), Decimal(spent), Decimal(reserved), Decimal(planned), 1)
    assert state.fits is fits


@pytest.mark.parametrize("wrong", [{"max_cost": 0}, {"max_cost": 5, "planned": -1}])
def test_a_wrong_amount_is_an_error_before_any_request(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "server_url": "http://127.0.0.1:9",
        "project_name": "main",
        "user_token": "t",
    }
    with (
        dstack.Client(**arguments) as client,
        pytest.raises(dstack.ConfigurationError, match="expected USD above 0"),
    ):
        read_budget(client, wrong.pop("max_cost"), marker_prefix="x", **wrong)
