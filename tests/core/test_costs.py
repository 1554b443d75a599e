"""What runs have cost: groups, times, pages, and sums that are exact."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import CostRow
from dstack_core._flow.costs import CostQuery, cost_query, read_costs
from dstack_core._wire.api import Api
from dstack_core._wire.runs import parse_run
from dstack_core.integration import show_costs
from dstack_core.local import LocalServer, VirtualTime
from tests.core.scripted import Driver, Script, recorded_reply, reply, run_json

API = Api("http://server", "main")
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
MARKERS = [
    "airflow:train/manual__2026-11-27T21:44:24+00:00/fit[3]/1of3#5f1c9a",
    "airflow:train/of/slashes/evaluate/2of3#5f1c9a/keep",
    "prefect:flow_run/0b1f/stop/3b0f92-0/1",
    None,
]


def run(number: int, cost: float, hours_ago: float, **changes: Any) -> dict[str, Any]:
    at = (NOW - timedelta(hours=hours_ago)).isoformat()
    marker = MARKERS[number % len(MARKERS)]
    return run_json("done", f"run-{number}", marker, f"id-{number}", cost=cost, submitted_at=at, **changes)


def pages(runs: list[dict[str, Any]]) -> Any:
    """Return the answer of a server that has these runs, newest first."""

    def answer(body: dict[str, Any]) -> Any:
        begin = 0
        if body.get("prev_run_id"):
            begin = 1 + [one["id"] for one in runs].index(body["prev_run_id"])
        return reply(runs[begin : begin + body["limit"]])

    return answer


def costs(driver: Driver, runs: list[dict[str, Any]], **query: Any) -> tuple[list[CostRow], Script]:
    script = Script(
        runs__list=[pages(runs)], projects__get=[recorded_reply("error_400_run_not_found_0.22.5")]
    )
    given = {"by": "owner", "since": None, "until": None, **query}
    rows = driver.run(read_costs(API, cost_query(now=NOW, **given)), script)
    return rows, script


def test_the_sum_of_many_runs_is_exact(driver: Driver) -> None:
    # As floats, 0.1 a thousand times is not 100.
    runs = [run(number, 0.1, number / 10) for number in range(1000)]
    rows, script = costs(driver, runs, by="day")
    assert sum(row.cost for row in rows) == Decimal(100)
    assert sum(row.runs for row in rows) == 1000
    # The last page is empty, as the one before was full.
    assert len(script.requests) == 11


def test_no_page_is_read_that_is_older_than_what_is_wanted(driver: Driver) -> None:
    runs = [run(number, 0.5, number / 10) for number in range(1000)]
    rows, script = costs(driver, runs, since="12h")
    assert sum(row.runs for row in rows) == 121
    assert len(script.requests) == 2
    rows, _ = costs(driver, runs, since="12h", until="6h")
    assert sum(row.runs for row in rows) == 60
    rows, _ = costs(driver, runs, since="2026-11-28", until=NOW - timedelta(hours=1))
    assert sum(row.runs for row in rows) == 110


def test_runs_are_grouped_by_what_owns_them(driver: Driver) -> None:
    tags = {"prefect-flow": "nightly", "prefect-task": "run-task", "team": "ml"}
    runs = [run(0, 1.0, 1), run(1, 2.0, 2, user="bob"), run(2, 4.5, 3), run(3, 0.25, 4)]
    runs[2]["run_spec"]["configuration"]["tags"] = tags

    def groups(by: Any, **query: Any) -> dict[str, float]:
        return {row.group: float(row.cost) for row in costs(driver, runs, by=by, **query)[0]}

    assert groups("owner") == {"prefect:flow_run": 4.5, "airflow:train": 3, "-": 0.25}
    assert groups("dag") == {"train": 3, "-": 4.75}
    assert groups("flow") == {"nightly": 4.5, "-": 3.25}
    assert groups("task") == {"fit": 1, "evaluate": 2, "run-task": 4.5, "-": 0.25}
    assert groups("tag:team") == {"ml": 4.5, "-": 3.25}
    assert groups("user")["bob"] == 2
    assert groups(("dag", "task"))["train / fit"] == 1
    assert groups("dag,task", marker_prefix="airflow:train/") == {"train / evaluate": 2, "train / fit": 1}
    assert groups("task", tags={"prefect-flow": "nightly"}) == {"run-task": 4.5}
    assert groups("day") == {"2026-11-28": 7.75}
    assert costs(driver, runs, by=["dag", "task"])[0][1].keys == {"dag": "train", "task": "evaluate"}


def test_a_run_has_the_gpu_of_its_machine() -> None:
    body = run(0, 1.0, 1)
    resources = {
        "cpus": 8,
        "memory_mib": 1024,
        "spot": False,
        "gpus": [{"name": "A100", "memory_mib": 81920}],
    }
    for part in (body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]):
        part["job_provisioning_data"]["instance_type"]["resources"] = resources
        part["job_runtime_data"] = None
    query = CostQuery(("gpu",), None, None)
    query.add(parse_run(body))
    assert [row.group for row in query.rows()] == ["A100"]


def test_deleted_and_replaced_runs_were_paid_for_too(driver: Driver) -> None:
    rows, _ = costs(driver, [run(0, 1.0, 1), run(0, 2.0, 2, deleted=True)])
    assert [row.cost for row in rows] == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": "colour"},
        {"by": ()},
        {"by": 3},
        {"by": "tag:"},
        {"since": "soon"},
        {"until": "2026-13-01"},
        {"since": True},
    ],
)
def test_a_wrong_argument_is_an_error_before_any_request(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "server_url": "http://127.0.0.1:9",
        "project_name": "main",
        "user_token": "t",
    }
    with (
        dstack.Client(**arguments) as client,
        pytest.raises(dstack.ConfigurationError, match=next(iter(wrong))),
    ):
        client.costs(**wrong)


# -- On a server


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """Return a server with a price at which seconds are visible, and some runs."""
    with VirtualTime(), LocalServer(price=36.0) as server, server.client() as client:
        for number, seconds in enumerate((10, 20, 30)):
            task = dstack.Task(commands=[f"sleep {seconds}"])
            marker = f"airflow:train/r/t{number % 2}/1of1#abcdef"
            client.runs.submit(task, f"run-{number}", marker=marker).wait()
        # One run replaces another of its name.
        client.runs.submit(dstack.Task(commands=["sleep 60"]), "run-0", marker="me").wait()
        yield server


def servers_sum(server: LocalServer) -> Decimal:
    return sum((Decimal(str(run.cost)) for run in server.runs), Decimal(0))


def test_the_sum_is_the_servers(server: LocalServer) -> None:
    with server.client() as client:
        rows = client.costs(by=("dag", "task"))
        assert sum(row.cost for row in rows) == servers_sum(server) > Decimal("1.2")
        assert {row.group: row.runs for row in rows} == {"- / -": 1, "train / t0": 2, "train / t1": 1}
        assert client.costs(by="dag", since="1s") == []

    async def work() -> list[CostRow]:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            return await client.costs(by=("dag", "task"))

    assert asyncio.run(work()) == rows


def test_a_command_shows_a_table_csv_or_json(server: LocalServer) -> None:
    with server.client() as client:
        table = show_costs(client, by="task", since="1d")
        text = show_costs(client, by="dag,task", since="1d", as_csv=True)
        data = show_costs(client, by="task", since="1d", as_json=True)
    assert table.splitlines()[-1].split()[:2] == ["TOTAL", "4"]
    assert f"{servers_sum(server):.2f} USD" in table.splitlines()[-1]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["dag", "task", "runs", "cost_usd"]
    assert sum(Decimal(row["cost_usd"]) for row in rows) == servers_sum(server)
    assert sum(Decimal(str(row["cost"])) for row in json.loads(data)) == servers_sum(server)


def test_a_project_that_does_not_exist_is_an_error(server: LocalServer) -> None:
    arguments: dict[str, Any] = {
        "server_url": server.url,
        "project_name": "nowhere",
        "user_token": server.token,
    }
    with dstack.Client(**arguments) as client, pytest.raises(dstack.ProjectNotFoundError):
        client.costs()


def test_csv_and_json_at_once_are_refused() -> None:
    with (
        dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t") as client,
        pytest.raises(dstack.ConfigurationError, match=r"^output: expected text with --csv, got json\."),
    ):
        show_costs(client, by="owner", since=None, as_csv=True, as_json=True)
