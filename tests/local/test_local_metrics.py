"""The metrics of the embedded server: measured from the job's processes, in the form of a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
import requests

from dstack_core.local import LocalServer
from tests.local.support import Api, differences, recording, wait_until


def metrics(api: Api, name: str, **query: Any) -> requests.Response:
    url = f"{api.server.url}/api/project/{api.server.project}/metrics/job/{name}"
    return api.session.get(url, params={"limit": 100, **query}, timeout=30)


def measured(api: Api, name: str, count: int = 1) -> dict[str, list[Any]]:
    """Wait for values and return them by name."""

    def enough() -> dict[str, list[Any]] | None:
        found = {one["name"]: one["values"] for one in metrics(api, name).json()["metrics"]}
        return found if len(found.get("cpu_usage_percent", ())) >= count else None

    return wait_until(enough) or {}


@pytest.fixture
def quick(make: Callable[..., Api]) -> Api:
    return make(metrics_seconds=0.1)


def test_the_reply_is_like_the_recorded_one(quick: Api, name: str) -> None:
    quick.apply(name, "sleep 60")
    measured(quick, name)
    theirs = recording("metrics_job_0.22.5")["response"]["json"]
    ours = metrics(quick, name, limit=1).json()
    assert [one["name"] for one in ours["metrics"]] == [one["name"] for one in theirs["metrics"]]
    assert differences(ours, theirs) == []
    quick.stop(name, abort=True)


def test_a_busy_process_is_seen_with_its_memory_and_an_idle_one_is_not(quick: Api, name: str) -> None:
    quick.apply(name, "python3 -c 'held = bytearray(50_000_000)\nwhile True: pass'")
    quick.apply(f"{name}-idle", "sleep 60")
    # A fifth of a core, which a busy process gets on a busy machine too, sooner or later.
    wait_until(lambda: max(measured(quick, name)["cpu_usage_percent"]) >= 20, seconds=100)
    wait_until(lambda: max(measured(quick, name)["memory_usage_bytes"]) > 50_000_000)
    idle = measured(quick, f"{name}-idle", 5)
    assert sorted(idle["cpu_usage_percent"])[2] <= 10
    assert max(idle["memory_usage_bytes"]) < 50_000_000
    assert set(idle["gpus_detected_num"]) == {0}
    assert "gpu_memory_total_bytes" not in idle


def test_values_stay_after_the_end_and_their_window_can_be_chosen(quick: Api, name: str) -> None:
    quick.apply(name, "sleep 60")
    measured(quick, name, 5)
    quick.stop(name, abort=True)
    quick.wait(name)
    found = metrics(quick, name).json()["metrics"][0]
    times = found["timestamps"]
    assert times == sorted(times, reverse=True)
    assert len(times) >= 5
    for query, expected in [
        ({"limit": 2}, times[:2]),
        ({}, times),
        # The value at ``after`` itself is only the one before the first, which a CPU needs.
        ({"after": times[2]}, times[:2]),
        ({"before": times[1]}, times[2:]),
        ({"after": times[0]}, []),
    ]:
        given = metrics(quick, name, **query).json()["metrics"]
        assert (given[0]["timestamps"] if given else []) == expected, query


def test_gpus_are_simulated_on_request(make: Callable[..., Api], name: str) -> None:
    api = make(metrics_seconds=0.05, gpu_usage=lambda seconds: (40.2 if seconds >= 0 else 0, 11))
    resources = {"gpu": {"name": ["A100"], "count": 2}}
    api.apply(name, "sleep 60", resources=resources)
    api.apply(f"{name}-own", "sleep 60", resources=resources, env={"DSTACK_LOCAL_GPU_USAGE": "97 70.5"})
    api.apply(f"{name}-cpu", "sleep 60")
    found = measured(api, name)
    assert set(found["gpus_detected_num"]) == {2}
    assert set(found["gpu_memory_total_bytes"]) == {80 * 2**30}
    for gpu in (0, 1):
        assert set(found[f"gpu_util_percent_gpu{gpu}"]) == {40}
        assert set(found[f"gpu_memory_usage_bytes_gpu{gpu}"]) == {11 * 2**30}
    assert set(measured(api, f"{name}-own")["gpu_util_percent_gpu1"]) == {97}
    assert set(measured(api, f"{name}-cpu")["gpus_detected_num"]) == {0}


def test_a_job_that_is_not_there_and_a_query_that_is_wrong(quick: Api, name: str) -> None:
    quick.run(name, "true")
    assert metrics(quick, name).json() == {"metrics": []}
    queries: list[tuple[str, dict[str, Any]]] = [
        (name, {"job_num": 3}),
        ("no-such-run", {}),
        (name, {"run_id": str(uuid4())}),
    ]
    for missing in [metrics(quick, each, **query) for each, query in queries]:
        assert missing.status_code == 400
        assert missing.json()["detail"][0]["msg"] == "Found no job with given parameters"
    assert metrics(quick, name, limit="many").status_code == 422


def test_a_server_measures_every_ten_seconds_by_default(name: str) -> None:
    with LocalServer() as server:
        assert server._metrics_seconds == 10.0
