"""A real dstack server that is restarted while it runs jobs whose runs are followed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

import dstack_core as dstack
from tests.faults.case import Adapter, Case
from tests.faults.judges import LINES, Life
from tests.faults.life import OVER, RESTARTS, STEPS, Result, new_name, runs_named
from tests.faults.own_losses import judge, logged_lines
from tests.faults.restarts_at_requests import WAYS, needs, try_at_requests
from tests.rig.server import RealServer, RigError

# Upper bounds in seconds for a busy machine: for a run to reach a moment, and for the retries of an adapter.
_SECONDS = 120.0
_BUDGET = 300.0
# A restart that came too late for its moment is tried again.
_TRIES = 3
_BEFORE_IT_RUNS = ("pending", "submitted", "provisioning", "pulling")


@dataclass(frozen=True)
class Runs:
    """The runs that are followed together, one by each adapter, and the files that their jobs create and await."""

    client: dstack.Client
    folder: Path
    names: Sequence[str]

    def commands(self, name: str) -> list[str]:
        """Return commands that print the lines in two halves, the second one once the file ``go`` exists."""
        half = len(LINES) // 2
        return [
            f"printf 'line-%03d\\n' $(seq 1 {half})",
            f"touch {self.folder / name}.half",
            f"until [ -e {self.folder / 'go'} ]; do sleep 0.1; done",
            f"printf 'line-%03d\\n' $(seq {half + 1} {len(LINES)})",
            f"touch {self.folder / name}.end",
        ]

    def go(self) -> None:
        """Let the jobs print their second halves."""
        (self.folder / "go").touch()

    def statuses(self) -> list[str | None]:
        """Return the status of each run on the server, None if it does not exist yet."""
        found = [self.client.runs.get(name) for name in self.names]
        return [run.raw_status if run is not None else None for run in found]

    def wait_for(self, mark: str) -> list[str | None]:
        """Wait until each job has created its file, and return the statuses of the runs."""
        _until(lambda: all((self.folder / f"{name}.{mark}").exists() for name in self.names))
        return self.statuses()


@dataclass(frozen=True)
class Moment:
    """The moment at which the server is restarted, and the status that the runs must have then."""

    name: str
    wait: Callable[[Runs], list[str | None]]
    is_right: Callable[[str | None], bool]
    kill: bool = False
    together: bool = True
    meanwhile: Callable[[Runs], None] = lambda runs: None


def _before_they_run(runs: Runs) -> list[str | None]:
    _until(lambda: None not in runs.statuses())
    return runs.statuses()


def _in_the_middle(runs: Runs) -> list[str | None]:
    runs.wait_for("half")
    # A server that ends before it recorded that the job started would start it again, and fail the run.
    _until(lambda: set(runs.statuses()) == {"running"})
    return runs.statuses()


def _at_the_end(runs: Runs) -> list[str | None]:
    _in_the_middle(runs)
    runs.go()
    return runs.wait_for("end")


MOMENTS = (
    Moment(
        "before the run is running, by kill -9",
        _before_they_run,
        lambda status: status in _BEFORE_IT_RUNS,
        kill=True,
        # A run that is submitted a moment later would find the other one running.
        together=False,
    ),
    Moment(
        "between the halves of its output; the second is printed during the restart",
        _in_the_middle,
        lambda status: status == "running",
        meanwhile=Runs.go,
    ),
    Moment(
        "while it ends, by kill -9",
        _at_the_end,
        lambda status: status is not None and status not in OVER,
        kill=True,
    ),
)


def try_restarts(adapters: Mapping[str, Adapter], steps: Collection[int]) -> list[Result]:
    """Return the results of a restart at each of these requests and, if these are all, at each moment."""
    moments = MOMENTS if set(STEPS) <= set(steps) else ()
    with RealServer(images=True, impatient=True, hosts=len(adapters)) as server:
        return [
            *(result for moment in moments for result in try_moment(server, moment, adapters)),
            *(result for way in WAYS for result in try_at_requests(server, way, adapters, steps)),
        ]


def try_moment(server: RealServer, moment: Moment, adapters: Mapping[str, Adapter]) -> list[Result]:
    """Return the results of a restart at that moment, one for each adapter if they cannot share it."""
    if moment.together:
        return _try_again(server, moment, adapters)
    return [one for name, adapter in adapters.items() for one in _try_again(server, moment, {name: adapter})]


def _try_again(server: RealServer, moment: Moment, adapters: Mapping[str, Adapter]) -> list[Result]:
    """Return the results of one restart; it is tried again if a run was already past the moment."""
    for _ in range(_TRIES):
        try:
            results = _try_moment(server, moment, adapters)
        except (TimeoutError, RigError, dstack.DstackError, httpx.HTTPError) as error:
            # Report the error on the page, and try the other moments.
            flaw = f"{type(error).__name__}: {error}"
            return [Result(RESTARTS, name, moment.name, 0, "?", False, flaw, 0.0) for name in adapters]
        if all(result.reached for result in results):
            break
    return results


def _try_moment(server: RealServer, moment: Moment, adapters: Mapping[str, Adapter]) -> list[Result]:
    arguments: dict[str, Any] = {
        "server_url": server.url,
        "project_name": server.project,
        "user_token": server.token,
    }
    names = [f"restarted-{new_name()}" for _ in adapters]
    with (
        tempfile.TemporaryDirectory(prefix="restart-") as folder,
        dstack.Client(**arguments) as client,
        ThreadPoolExecutor(len(adapters)) as pool,
    ):
        runs = Runs(client, Path(folder), names)

        def follow(adapter: Adapter, name: str) -> Life:
            task = {"type": "task", "commands": runs.commands(name), **needs(server)}
            case = Case(server.url, server.project, server.token, name, task, _BUDGET, 0.5, 10.0)
            began, started = datetime.now(UTC), time.monotonic()
            ended = adapter(case)
            return Life(ended, runs_named(server, name, began), (), time.monotonic() - started)

        try:
            lives = [pool.submit(follow, *item) for item in zip(adapters.values(), names, strict=True)]
            statuses = moment.wait(runs)
            server.restart(lambda: moment.meanwhile(runs), kill=moment.kill)
        finally:
            runs.go()
        return [
            _judged(server, moment, name, status, life.result(_SECONDS + _BUDGET))
            for name, status, life in zip(adapters, statuses, lives, strict=True)
        ]


def _judged(server: RealServer, moment: Moment, adapter: str, status: str | None, life: Life) -> Result:
    flaw, loss = judge(life, logged_lines(server, life.runs[0]) if life.runs else [])
    return Result(
        RESTARTS,
        adapter,
        moment.name,
        0,
        status or "?",
        moment.is_right(status),
        flaw,
        round(life.seconds, 1),
        loss,
    )


def _until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("the runs did not reach the expected state in time")
        time.sleep(0.05)
