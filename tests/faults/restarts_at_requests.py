"""A real dstack server that is restarted at each request of a run's life in turn.

A restart takes seconds, so several lives share one. Each life has its own step, the request that the restart must
hit. The proxy of each life counts its requests and holds the one with that number; a `Meeting` waits until every
life is held or has ended, then restarts the server once and lets all held requests fail.

Lives with different steps would arrive at different times, and a client gives up a request that is held too long. So
they start in turn: the life with the most requests before its step starts first, and another one starts once no
other life has more requests left than it has. A life that ended before its step gets another restart (`_TRIES`).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

import dstack_core as dstack
from tests.faults.case import Adapter, Case
from tests.faults.judges import Life
from tests.faults.life import GATE_AT, OVER, RESTARTS, Result, commands, new_name, runs_named
from tests.faults.loop import Loop
from tests.faults.own_losses import judge, logged_lines
from tests.faults.proxy import Answer, FaultProxy, Forward
from tests.rig.server import RealServer, RigError

# How many different requests share a restart; many more would be too many runs at once for two cores.
TOGETHER = 4
# The restart shall hit a run that starts, which takes two seconds, at the first ten requests, and one that runs or
# ends at the others. Hence the poll intervals, in seconds. docs/reliability.md names all three numbers.
_LAST_OF_A_START = 10
_START_POLL_INTERVAL = 0.3
_POLL_INTERVAL = 1.0
# Seconds. A request is held until all lives are at theirs, and its client must not give up meanwhile.
_TIMEOUT = 90.0
# Upper bounds in seconds for a busy machine: for the retries of an adapter, and for all lives to arrive.
_BUDGET = 300.0
_SECONDS = 240.0
# A life that did not reach its request is tried again.
_TRIES = 3


@dataclass(frozen=True)
class Way:
    """A way to restart the server at a request."""

    name: str
    carried_out: bool
    kill: bool


WAYS = (
    Way("carried out, then ended by SIGTERM; the reply is lost", carried_out=True, kill=False),
    Way("kill -9 before it is carried out", carried_out=False, kill=True),
)


@dataclass(frozen=True)
class Plan:
    """The plan of one life: the run's name, the adapter that follows it, and the request to hold."""

    name: str
    adapter: str
    step: int

    @property
    def poll_interval(self) -> float:
        return _START_POLL_INTERVAL if self.step <= _LAST_OF_A_START else _POLL_INTERVAL


class Meeting:
    """The point where all lives wait at their requests until the server is restarted, once for all."""

    def __init__(self, server: RealServer, way: Way, loop: Loop, plans: Sequence[Plan]) -> None:
        self._server = server
        self._way = way
        self._loop = loop
        self._remaining = {plan.name: plan.step for plan in plans}
        self._changed = threading.Condition()
        self._down = asyncio.Event()
        self.held: set[str] = set()

    def wait_for_turn(self, plan: Plan) -> None:
        """Wait until no other life has more requests left, so that all reach theirs at about the same time."""
        with self._changed:
            self._changed.wait_for(lambda: max(self._remaining.values(), default=0) <= plan.step, _SECONDS)

    async def between(self, plan: Plan, number: int, body: bytes, forward: Forward) -> Answer:
        """Carry a request out; hold the one at the life's step until the server is down, then fail it."""
        if number != plan.step:
            answer = await forward(body)
            self._note(plan, plan.step - number)
            return answer
        if self._way.carried_out:
            await forward(body)
        self.held.add(plan.name)
        self._note(plan, 0)
        await self._down.wait()
        raise ConnectionResetError("the server is gone")

    def leave(self, plan: Plan) -> None:
        """Record that a life has ended, whether it reached its request or not."""
        self._note(plan, 0)

    def restart(self) -> None:
        """Wait for all lives, and restart the server; held requests fail once it is down."""
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._remaining, _SECONDS):
                    raise TimeoutError(f"these lives did not reach their requests: {self._remaining}")
            self._server.restart(self._release, kill=self._way.kill)
        finally:
            self._release()

    def _release(self) -> None:
        self._loop.loop.call_soon_threadsafe(self._down.set)

    def _note(self, plan: Plan, remaining: int) -> None:
        with self._changed:
            if remaining > 0:
                self._remaining[plan.name] = remaining
            else:
                self._remaining.pop(plan.name, None)
            self._changed.notify_all()


def needs(server: RealServer) -> dict[str, Any]:
    """Return the keys that a task needs to run on a server of that release."""
    return {"user": "root", "fleets": [server.fleet]} if server.release >= (0, 19, 3) else {"user": "root"}


def try_at_requests(
    server: RealServer, way: Way, adapters: Mapping[str, Adapter], steps: Collection[int]
) -> list[Result]:
    """Return the results of a restart at each of these requests, of a run followed by each adapter."""
    results: list[Result] = []
    for group in _groups(sorted(steps)):
        results += _try_group(server, way, adapters, group)
    return sorted(results, key=lambda result: result.step)


def _groups(steps: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield groups of steps with the same poll interval and far apart, so that no request is held long."""
    first = [step for step in steps if step <= _LAST_OF_A_START]
    for part in (first, steps[len(first) :]):
        count = -(-len(part) // TOGETHER)
        yield from (part[start::count] for start in range(count))


def _try_group(
    server: RealServer, way: Way, adapters: Mapping[str, Adapter], steps: Sequence[int]
) -> list[Result]:
    """Return the results of one restart; lives that did not reach their request get another one."""
    missing = [(name, step) for step in steps for name in adapters]
    found: dict[tuple[str, int], Result] = {}
    for _ in range(_TRIES):
        for result in _try_together(server, way, adapters, missing):
            found[result.adapter, result.step] = result
        missing = [key for key in missing if not found[key].reached]
        if not missing:
            break
    return list(found.values())


def _try_together(
    server: RealServer, way: Way, adapters: Mapping[str, Adapter], wanted: Collection[tuple[str, int]]
) -> list[Result]:
    plans = [Plan(f"restarted-{new_name()}", *one) for one in wanted]
    with (
        tempfile.TemporaryDirectory(prefix="restart-") as folder,
        Loop() as loop,
        ThreadPoolExecutor(len(plans)) as pool,
    ):
        meeting = Meeting(server, way, loop, plans)
        lives = [
            pool.submit(_live, meeting, server, loop, Path(folder), plan, adapters[plan.adapter])
            for plan in plans
        ]
        try:
            meeting.restart()
        except (TimeoutError, RigError) as error:
            # Report the error on the page, and try the other requests.
            return [_result(way, plan, "?", False, f"{type(error).__name__}: {error}") for plan in plans]
        return [
            _judged(server, way, plan, life.result(_SECONDS + _BUDGET), plan.name in meeting.held)
            for plan, life in zip(plans, lives, strict=True)
        ]


def _live(
    meeting: Meeting, server: RealServer, loop: Loop, folder: Path, plan: Plan, adapter: Adapter
) -> Life:
    """Follow one run until it ends, behind a proxy that holds one request."""
    gate = folder / plan.name
    os.mkfifo(gate)
    task = {"type": "task", "commands": commands(gate), **needs(server)}
    meeting.wait_for_turn(plan)
    began, started = datetime.now(UTC), time.monotonic()

    async def between(number: int, _: str, body: bytes, forward: Forward) -> Answer:
        return await meeting.between(plan, number, body, forward)

    try:
        with FaultProxy(loop, server.url, gate=gate, gate_at=GATE_AT, between=between) as proxy:
            case = Case(
                proxy.url,
                server.project,
                server.token,
                plan.name,
                task,
                _BUDGET,
                plan.poll_interval,
                _TIMEOUT,
            )
            ended = adapter(case)
            paths = proxy.served.paths
    finally:
        meeting.leave(plan)
    return Life(ended, runs_named(server, plan.name, began), paths, time.monotonic() - started)


def _judged(server: RealServer, way: Way, plan: Plan, life: Life, reached: bool) -> Result:
    endpoint = life.paths[plan.step - 1] if plan.step <= len(life.paths) else "?"
    try:
        logged = logged_lines(server, life.runs[0]) if life.runs else []
        flaw, loss = judge(life, logged)
        _end(server, life)
    except (httpx.HTTPError, dstack.DstackError) as error:
        flaw, loss = f"{type(error).__name__}: {error}", ""
    return _result(way, plan, endpoint, reached, flaw, loss, life.seconds)


def _result(
    way: Way, plan: Plan, endpoint: str, reached: bool, flaw: str, loss: str = "", seconds: float = 0.0
) -> Result:
    return Result(
        RESTARTS, plan.adapter, way.name, plan.step, endpoint, reached, flaw, round(seconds, 1), loss
    )


def _end(server: RealServer, life: Life) -> None:
    """Abort the run of a life if it is still active, so that it does not occupy a host."""
    if any(run["status"] not in OVER for run in life.runs):
        with dstack.Client(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            client.runs.stop(life.runs[0]["run_spec"]["run_name"], abort=True)
