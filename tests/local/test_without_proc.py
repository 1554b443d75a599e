"""The embedded server where there is no ``/proc``, as on macOS: jobs end at once and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from dstack_core.local import reaper
from tests.local.support import Api, alive, wait_until

# Processes in the job's group, and in a group of their own.
FAMILY = (
    "trap '' INT; sleep 300 & echo pid $!; (set -m; sleep 300 & echo pid $!); echo pid $$; echo ready; wait"
)


@pytest.fixture(autouse=True, params=["ps", "neither"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(reaper, "_PROC", tmp_path / "none")
    if request.param == "neither":
        monkeypatch.setattr(reaper, "_PS", (str(tmp_path / "ps"),))
    return str(request.param)


def session() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", "sleep 300 & (set -m; sleep 300 & echo $!); wait"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )


def test_what_is_killed_is_the_session(by: str) -> None:
    with session() as leader, session() as other:
        assert leader.stdout is not None
        assert other.stdout is not None
        child = int(leader.stdout.readline())
        spared = int(other.stdout.readline())
        if by == "ps":
            assert {leader.pid, child} <= set(reaper.members([leader.pid]))
        else:
            assert reaper.members([leader.pid]) == [leader.pid]
        reaper.kill_all([leader.pid])
        assert leader.wait(20) == -9
        assert alive(spared)
        assert other.poll() is None
        if by == "ps":
            wait_until(lambda: not alive(child))
        else:
            os.kill(child, 9)
        os.killpg(other.pid, 9)
        os.kill(spared, 9)


def test_a_process_that_got_the_id_of_a_job_later_is_spared() -> None:
    with subprocess.Popen(["sleep", "300"]) as stranger:
        # It leads no session, so no job of that id is left.
        assert reaper.members([stranger.pid]) == []
        reaper.kill_all([stranger.pid])
        assert stranger.poll() is None
        stranger.kill()


def test_an_ended_session_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"], start_new_session=True) as ended:
        ended.wait()

    def waits(seconds: float) -> NoReturn:
        raise AssertionError("a pause, although no process is left")

    # Of the reaper alone: the standard library pauses with the same function.
    monkeypatch.setattr(reaper, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits))
    reaper.kill_all([ended.pid], "ANY=thing")


def test_no_session_means_no_process() -> None:
    assert reaper.members([], "ANY=thing") == []


# Without ps the children of a job are not found.
@pytest.mark.parametrize("by", ["ps"], indirect=True)
def test_a_stopped_run_leaves_no_process(make: Callable[..., Api], name: str, by: str) -> None:
    api = make(stop_grace_seconds=0.2)
    api.apply(name, FAMILY)
    output = api.output(api.wait_output(name, "ready"))
    pids = [int(line.split()[1]) for line in output.splitlines() if line.startswith("pid")]
    assert len(pids) == 3
    api.stop(name)
    wait_until(lambda: not any(map(alive, pids)))
