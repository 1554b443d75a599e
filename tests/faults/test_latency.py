"""The proxy of a slow server works as configured, and the judge finds what is wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency import Latency, LatencyCase, LatencyProxy
from tests.faults.latency_judge import Said, Seen
from tests.faults.latency_matrix import table, try_latencies
from tests.faults.loop import Loop
from tests.rig.server import RealServer


@pytest.fixture
def run(server: LocalServer) -> Iterator[dstack.Run]:
    with server.client() as client:
        run = client.runs.submit(dstack.Task(commands=["sleep 600"]))
        _until(lambda: run.refresh().raw_status == "running")
        yield run
        run.stop(abort=True)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


def test_a_slow_server_stops_the_run_after_its_client_disconnected(
    server: LocalServer, run: dstack.Run, loop: Loop
) -> None:
    with LatencyProxy(loop, server.url, Latency("slow", lambda path: 2.0)) as proxy:
        moment = time.monotonic()
        _ask(proxy, server, run, "runs/get")
        assert time.monotonic() - moment < 2.0, "it is quick until the fault begins"
        proxy.begin()
        moment = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            _ask(proxy, server, run, "runs/stop", timeout=0.5)
        assert not proxy.is_idle
        _until(lambda: run.refresh().raw_status != "running")
        assert time.monotonic() - moment >= 2.0
        assert [one.path for one in proxy.requests] == ["runs/get", "runs/stop"]


def test_drops_as_many_stops_as_configured(server: LocalServer, run: dstack.Run, loop: Loop) -> None:
    with LatencyProxy(loop, server.url, Latency("drops", drops=2)) as proxy:
        proxy.begin()
        for _ in range(2):
            assert _ask(proxy, server, run, "runs/stop") == 200
            assert run.refresh().raw_status == "running"
        assert _ask(proxy, server, run, "runs/stop") == 200
        assert run.refresh().raw_status != "running"
        assert len(proxy.stops_since(0.0)) == 3


def _way(shown: str, *log: tuple[int, str], stops: bool = True) -> Callable[[LatencyCase], Seen]:
    """Return a way whose host stops at once, shows this state and logs these records about its run."""

    def way(case: LatencyCase) -> Seen:
        run = case.client.runs.submit(dstack.Task(commands=["sleep 600"]), run_name=case.name)
        case.wait_for_run(lambda: run)
        case.begin()
        case.caused()
        if stops:
            _ask(case.proxy, case.server, run, "runs/stop")
        case.watch(run, 2.0)
        return Seen(shown, ["failed"], [Said(level, text.format(run=run)) for level, text in log])

    return way


_PAGE = (logging.WARNING, "Stopping run {run.name}: https://elsewhere.example/projects/main/runs/{run.id}")
_CLAIM = (logging.INFO, "Run {run.name} is stopped")


@pytest.mark.parametrize(
    ("way", "fault", "how", "flaw"),
    [
        (_way("failed", _CLAIM), "each reply 0.5 s", "in time", ""),
        (_way("success", _PAGE), "each reply 0.5 s", "not", "expected the host to show failed, got success"),
        (_way("failed", _PAGE, stops=False), "each reply 0.5 s", "not", "expected a stopped run within 2 s"),
        (_way("failed", _PAGE), "each reply 4 s", "late", ""),
        (_way("failed", _CLAIM), "each reply 4 s", "not", "no warning names its page"),
        (_way("failed", _PAGE), "drops every stop", "reaper", ""),
        (_way("failed"), "drops every stop", "not", "no warning names its page"),
        (_way("failed", _PAGE, _CLAIM), "drops every stop", "not", "the log's last record about it is"),
    ],
)
def test_the_judge(
    server: LocalServer, way: Callable[[LatencyCase], Seen], fault: str, how: str, flaw: str
) -> None:
    def reap() -> None:
        with server.client() as client:
            for run in client.runs.list():
                run.stop()

    (result,) = try_latencies(server, {"way": way}, reap, only=fault)
    assert (result.how, flaw in result.flaw) == (how, True), result
    assert bool(result.flaw) == bool(flaw)
    mark = {"late": " +", "reaper": r" \*"}.get(how, "")
    assert f"| way | {0 if flaw else 1}/1{mark} |" in table([result])


def test_a_reaper_that_fails_is_a_flaw(server: LocalServer) -> None:
    def reap() -> None:
        raise RuntimeError("no right")

    (result,) = try_latencies(server, {"way": _way("failed", _PAGE)}, reap, only="drops every stop")
    assert result.flaw == "the reaper did not stop the run (RuntimeError: no right)"


def _ask(
    proxy: LatencyProxy, server: LocalServer | RealServer, run: dstack.Run, path: str, timeout: float = 30.0
) -> int:
    body = {"run_name": run.name} if path == "runs/get" else {"runs_names": [run.name], "abort": False}
    headers = {"Authorization": f"Bearer {server.token}"}
    url = f"{proxy.url}/api/project/{server.project}/{path}"
    return httpx.post(url, json=body, headers=headers, timeout=timeout).status_code


def _until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
