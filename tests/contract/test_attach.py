"""Attaching to real runs: every kind of route, live logs, cut connections, keys, and nothing left open."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import dstack_core as dstack
from tests.contract.attach_ways import (
    EXPECTED,
    HALF,
    LINES,
    Way,
    behind,
    counting,
    fetch,
    lines,
    new_key,
    polled,
)
from tests.contract.conftest import stop_and_wait
from tests.core.ssh_hosts import no_thread_of_ours_is_left
from tests.local.support import wait_until
from tests.ports import free_port
from tests.rig.server import DEFAULT_VERSION, RealServer

pytestmark = pytest.mark.real

RELEASE = tuple(int(part) for part in DEFAULT_VERSION.split("."))
WAYS = ["two hops"]
if RELEASE >= (0, 19):
    WAYS.append("three hops")
if RELEASE >= (0, 20, 14):
    WAYS.append("one hop")
PACE = 0.5


@pytest.fixture(scope="session")
def ways(real_server: RealServer) -> Iterator[Callable[[str], Way]]:
    """Yield a function that returns each way, started at its first use."""
    known = {"two hops": Way(real_server)}
    with contextlib.ExitStack() as started:

        def start(name: str) -> Way:
            if name not in known:
                known[name] = Way(started.enter_context(behind(name, real_server)))
            return known[name]

        yield start


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, ways: Callable[[str], Way], _home: Path) -> Way:
    chosen = ways(request.param)
    if request.param == "three hops":
        # The jump host accepts a key of the user, not the run's.
        folder = _home / ".ssh"
        folder.mkdir()
        (folder / "config").write_text(f"Host 127.0.0.1\n  IdentityFile {chosen.server.jump_key_path}\n")
    return chosen


@pytest.fixture
def direct(ways: Callable[[str], Way]) -> Way:
    return ways("two hops")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


_nothing_is_left = pytest.fixture(autouse=True)(no_thread_of_ours_is_left)


def test_every_way_in_forwards_ports_and_streams_logs(way: Way, tmp_path: Path) -> None:
    inside, outside, flag = free_port(), free_port(), tmp_path / "go"
    (tmp_path / "index.html").write_text("from inside")
    web = f"cd {tmp_path} && python3 -m http.server {inside} --bind 127.0.0.1 & " + counting(flag)
    with way.client() as client:
        run = client.runs.submit(way.task(web, ports=[f"{outside}:{inside}"]))
        with run.attach(poll_interval=PACE, timeout=200) as attached:
            assert attached is run
            assert (run.is_attached, dict(run.ports)) == (True, {inside: outside})
            assert run.attach() is run
            live = b""
            for chunk in run.logs(poll_interval=PACE):
                live += chunk
                if HALF in live and not flag.exists():
                    # The job still runs, so what was read is live and its ports can be reached.
                    assert fetch(outside) == b"from inside"
                    flag.touch()
            assert lines(live) == EXPECTED
            hops = way.server.clients.count()
            assert hops <= 3
        assert (run.is_attached, dict(run.ports)) == (False, {})
        assert run.wait(120, poll_interval=PACE).succeeded
        assert polled(way, run) == live
        run.detach()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", outside), timeout=5)


def test_a_connection_that_is_cut_loses_no_line_and_repeats_none(way: Way, tmp_path: Path) -> None:
    third = LINES // 3
    cuts = {f"line {end}\r\n".encode(): tmp_path / f"go-after-{end}" for end in (third, 2 * third)}
    live = b""
    with way.client() as client:
        run = client.runs.submit(way.task(counting(*cuts.values())))
        with run.attach(poll_interval=PACE, timeout=200):
            for chunk in run.logs(poll_interval=PACE):
                live += chunk
                for end, flag in cuts.items():
                    # The job waits for its flag, so a connection exists or is being reopened.
                    if end in live and not flag.exists():
                        wait_until(way.server.clients.count, seconds=60)
                        assert way.server.clients.cut() >= 1
                        flag.touch()
    assert all(flag.exists() for flag in cuts.values())
    assert lines(live) == EXPECTED
    assert polled(way, run) == live


def test_the_servers_log_completes_that_of_a_container_that_became_unreachable(
    direct: Way, tmp_path: Path
) -> None:
    flag, live = tmp_path / "go", b""
    with direct.client() as client, contextlib.ExitStack() as refused:
        run = client.runs.submit(direct.task(counting(flag)))
        with run.attach(poll_interval=PACE, timeout=200):
            for chunk in run.logs(poll_interval=PACE):
                live += chunk
                if HALF in live and not flag.exists():
                    refused.enter_context(direct.server.clients.refused())
                    flag.touch()
    assert lines(live) == EXPECTED
    assert polled(direct, run) == live


def test_a_retried_job_is_followed_into_its_new_container(direct: Way, tmp_path: Path) -> None:
    flag = tmp_path / "tried"
    command = f"if [ -e {flag} ]; then echo line 2; else touch {flag}; echo line 1; exit 1; fi"
    task = direct.task(command, retry={"on_events": ["error"], "duration": 3600})
    with direct.client() as client:
        run = client.runs.submit(task)
        with run.attach(poll_interval=PACE, timeout=200):
            live = b"".join(run.logs(poll_interval=PACE))
        assert run.wait(120, poll_interval=PACE).succeeded
    assert lines(live) == ["line 1", "line 2"]


def test_a_finished_run_is_not_attached_and_its_log_is_read_from_the_server(direct: Way) -> None:
    with direct.client() as client:
        for command, status in [("echo line 1", "done"), ("echo line 1; exit 3", "failed")]:
            run = client.runs.submit(direct.task(command))
            run.wait(200, poll_interval=PACE)
            run.attach(poll_interval=PACE)
            try:
                assert (run.is_attached, run.raw_status) == (False, status)
                assert lines(b"".join(run.logs())) == ["line 1"]
            finally:
                run.detach()


def test_a_wrong_key_is_refused_and_leaves_nothing_open(direct: Way, tmp_path: Path) -> None:
    port = free_port()
    wrong = new_key(tmp_path / "wrong")
    with direct.client() as client:
        run = client.runs.submit(direct.task("sleep 600", ports=[port]))
        try:
            with pytest.raises(dstack.AttachError) as caught:
                run.attach(wrong, poll_interval=PACE, timeout=200)
            assert "submitted with the SSH key ssh-rsa SHA256:" in str(caught.value)
            assert str(wrong) in str(caught.value)
            assert not run.is_attached
            socket.create_server(("127.0.0.1", port)).close()
            # The right key still opens it.
            run.attach(poll_interval=PACE, timeout=200).detach()
        finally:
            run.stop(abort=True)


def test_an_own_key_is_submitted_with_the_run_and_attaches_to_it(direct: Way, tmp_path: Path) -> None:
    own = new_key(tmp_path / "own")
    with dstack.Client.from_config(**direct.arguments(), ssh_identity_file=own) as client:
        run = client.runs.submit(direct.task("echo line 1"))
        with run.attach(poll_interval=PACE, timeout=200):
            assert lines(b"".join(run.logs(poll_interval=PACE))) == ["line 1"]


def test_waiting_for_a_run_ends_in_time(direct: Way) -> None:
    with direct.client() as client:
        run = client.runs.submit(direct.task("sleep 600"))
        try:
            with pytest.raises(dstack.WaitTimeoutError, match="had not started after 0 s"):
                run.attach(timeout=0, poll_interval=PACE)
        finally:
            run.stop(abort=True)


def test_stopping_an_attached_run_ends_its_log(direct: Way) -> None:
    with direct.client() as client:
        run = client.runs.submit(direct.task("echo line 1; sleep 600"))
        run.attach(poll_interval=PACE, timeout=200)
        live = b""
        with ThreadPoolExecutor(1) as pool, run:
            for chunk in run.logs(poll_interval=PACE):
                live += chunk
                if lines(live) == ["line 1"]:
                    stopping = pool.submit(stop_and_wait, run)
        assert lines(live) == ["line 1"]
        assert stopping.result().status is dstack.RunStatus.TERMINATED


def test_attach_refuses_a_taken_local_port(direct: Way) -> None:
    port = free_port()
    with direct.client() as client:
        run = client.runs.submit(direct.task("sleep 600", ports=[port]))
        try:
            with (
                socket.create_server(("127.0.0.1", port)),
                pytest.raises(dstack.PortInUseError, match=f"local port {port} is taken"),
            ):
                run.attach(poll_interval=PACE, timeout=200)
            assert not run.is_attached
        finally:
            run.stop(abort=True)


def test_the_async_twin_does_the_same(direct: Way, tmp_path: Path) -> None:
    inside, outside, flag = free_port(), free_port(), tmp_path / "go"
    (tmp_path / "index.html").write_text("from inside")
    web = f"cd {tmp_path} && python3 -m http.server {inside} --bind 127.0.0.1 & " + counting(flag)

    async def scenario() -> bytes:
        live, cuts = b"", 0
        async with dstack.AsyncClient(**direct.arguments()) as client:
            run = await client.runs.submit(direct.task(web, ports=[f"{outside}:{inside}"]))
            async with await run.attach(poll_interval=PACE, timeout=200):
                assert dict(run.ports) == {inside: outside}
                async for chunk in run.logs(poll_interval=PACE):
                    live += chunk
                    if HALF in live and not cuts:
                        assert await asyncio.to_thread(fetch, outside) == b"from inside"
                        cuts = direct.server.clients.cut()
                        flag.touch()
            assert not run.is_attached
            await run.detach()
            assert (await run.wait(120, poll_interval=PACE)).succeeded
        assert cuts >= 1
        return live

    assert lines(asyncio.run(scenario())) == EXPECTED


def test_an_async_reader_that_is_cancelled_can_still_detach(direct: Way) -> None:
    port = free_port()

    async def scenario() -> None:
        async with dstack.AsyncClient(**direct.arguments()) as client:
            run = await client.runs.submit(direct.task("sleep 600", ports=[port]))
            try:
                await run.attach(poll_interval=PACE, timeout=200)
                reading = asyncio.create_task(anext(run.logs()))
                await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await run.detach()
            finally:
                await run.stop(abort=True)

    asyncio.run(scenario())
    listening = [c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert port not in listening
