"""Choosing the attempt, submitting it once, stopping it: against a client made of plain data."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from dstack_core import RunStatus, ServerUnreachableError
from prefect_dstack._names import Identity
from prefect_dstack._steps import adrive, drive
from prefect_dstack._stop import stop_steps
from prefect_dstack._submit import Target, acquire

LOGGER = logging.getLogger("submit-test")
BASE = "pf-1-2-0"
STEM = "prefect:flow_run/1/stop/2-0"


@dataclass
class FakeRun:
    name: str
    marker: str
    now: RunStatus = RunStatus.RUNNING
    statuses: list[RunStatus] = field(default_factory=list)

    @property
    def raw_status(self) -> str:
        return str(self.now)

    def outcome(self) -> Any:
        return SimpleNamespace(succeeded=self.now is RunStatus.DONE) if self.now.is_finished else None

    def status(self) -> RunStatus:
        self.now = self.statuses.pop(0) if self.statuses else self.now
        return self.now


class FakeClient:
    """Keep runs by name; raise the given errors first."""

    def __init__(self, *runs: FakeRun, errors: list[Exception | None] | None = None) -> None:
        self.kept = {run.name: run for run in runs}
        self.errors = errors or []
        self.calls: list[tuple[str, str]] = []
        self.runs = self

    def _call(self, kind: str, name: str) -> None:
        self.calls.append((kind, name))
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error

    def get(self, name: str) -> FakeRun | None:
        self._call("get", name)
        return self.kept.get(name)

    def submit(self, *, run_name: str, marker: str, **spec: Any) -> FakeRun:
        self._call("submit", run_name)
        found = self.kept.get(run_name)
        if found is None or found.marker != marker:
            found = self.kept[run_name] = FakeRun(run_name, marker)
        return found

    def stop(self, name: str) -> None:
        self._call("stop", name)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def target(fixed: str | None = None) -> Target:
    return Target.of(Identity(BASE, STEM, fixed))


def acquired(client: FakeClient, aim: Target, budget: float = 600.0, clock: Clock | None = None) -> FakeRun:
    clock = clock or Clock()
    run = drive(acquire(aim, {"configuration": "x"}, budget, LOGGER, clock), client, clock.sleep)
    assert isinstance(run, FakeRun)
    return run


def lost() -> ServerUnreachableError:
    return ServerUnreachableError("no answer")


def test_nothing_there_submits_the_first_attempt() -> None:
    client, aim = FakeClient(), target()
    assert acquired(client, aim).name == BASE
    assert client.calls == [("get", BASE), ("submit", BASE)]
    assert (aim.is_chosen, aim.is_adopted, aim.may_appear) == (True, False, False)


@pytest.mark.parametrize("status", [RunStatus.RUNNING, RunStatus.DONE, RunStatus("a-new-status")])
def test_an_active_or_successful_run_is_taken(status: RunStatus) -> None:
    earlier, aim = FakeRun(BASE, f"{STEM}/1", status), target()
    assert acquired(FakeClient(earlier), aim) is earlier
    assert aim.is_adopted


@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.TERMINATED])
def test_a_run_that_did_not_succeed_is_followed_by_a_new_one(status: RunStatus) -> None:
    client = FakeClient(
        FakeRun(BASE, f"{STEM}/1", status), FakeRun(f"{BASE}-2", f"{STEM}/2", RunStatus.FAILED)
    )
    assert acquired(client, target()).name == f"{BASE}-3"


def test_a_stopping_run_is_waited_for_and_not_joined() -> None:
    stopping = FakeRun(
        BASE, f"{STEM}/1", RunStatus.TERMINATING, [RunStatus.TERMINATING, RunStatus.TERMINATED]
    )
    clock = Clock()
    run = acquired(FakeClient(stopping), target(), clock=clock)
    assert run.name == f"{BASE}-2"
    assert clock.now > 0


def test_a_callers_name_is_kept_in_the_next_attempt() -> None:
    client = FakeClient(FakeRun("train", f"{STEM}/1", RunStatus.FAILED))
    run = acquired(client, target("train"))
    assert (run.name, run.marker) == ("train", f"{STEM}/2")


def test_another_owners_run_is_left_to_submit_to_judge() -> None:
    client = FakeClient(FakeRun("train", "somebody else"))
    assert acquired(client, target("train")).marker == f"{STEM}/1"


def test_silence_is_borne_and_nothing_is_chosen_twice() -> None:
    client, clock = FakeClient(errors=[lost(), lost(), None, lost(), lost(), None]), Clock()
    acquired(client, target(), clock=clock)
    assert [kind for kind, _ in client.calls] == ["get"] * 3 + ["submit"] * 3


def test_a_run_that_failed_while_the_server_was_silent_is_not_repeated() -> None:
    """The reply to the submission is lost and the run has failed when the server is back."""

    class Losing(FakeClient):
        def submit(self, *, run_name: str, marker: str, **spec: Any) -> FakeRun:
            run = super().submit(run_name=run_name, marker=marker, **spec)
            if run.now is RunStatus.RUNNING:
                run.now = RunStatus.FAILED
                raise lost()
            return run

    client = Losing()
    assert acquired(client, target()).name == BASE
    assert len(client.kept) == 1


def test_the_budget_ends_the_patience_and_says_what_may_be_left() -> None:
    client, clock, aim = FakeClient(errors=[None] + [lost()] * 99), Clock(), target()
    with pytest.raises(ServerUnreachableError, match=f"dstack stop {BASE}"):
        acquired(client, aim, 30.0, clock)
    assert 29.0 <= clock.now <= 31.0
    with pytest.raises(ServerUnreachableError, match="nothing was submitted"):
        acquired(FakeClient(errors=[lost()] * 99), target(), 30.0, Clock())


def stopped(client: FakeClient, aim: Target) -> tuple[Any, float]:
    clock = Clock()
    return drive(stop_steps(aim), client, clock.sleep), clock.now


def test_stopping_asks_for_the_own_run_only() -> None:
    client = FakeClient(FakeRun(BASE, f"{STEM}/1"))
    assert stopped(client, target())[0] is client.kept[BASE]
    assert client.calls == [("get", BASE), ("stop", BASE)]
    for other in (
        FakeRun(BASE, "somebody else"),
        FakeRun(BASE, f"{STEM}/1", RunStatus.DONE),
        FakeRun(BASE, f"{STEM}/1", RunStatus.TERMINATING),
    ):
        client = FakeClient(other)
        stopped(client, target())
        assert client.calls == [("get", BASE)]


def test_a_submission_under_way_is_waited_for_and_then_stopped() -> None:
    aim = target()
    aim.may_appear = True

    class Late(FakeClient):
        def get(self, name: str) -> FakeRun | None:
            if len(self.calls) == 3:
                self.kept[BASE] = FakeRun(BASE, f"{STEM}/1")
            return super().get(name)

    client = Late()
    assert stopped(client, aim)[0] is not None
    assert client.calls[-1] == ("stop", BASE)
    assert stopped(FakeClient(), aim) == (None, 4.0)
    assert stopped(FakeClient(), target()) == (None, 0.0)


def test_the_async_driver_takes_the_same_steps() -> None:
    class AsyncFake:
        """Await what the plain client does."""

        def __init__(self, client: FakeClient) -> None:
            self._client = client
            self.runs = self

        def __getattr__(self, name: str) -> Any:
            async def call(*args: Any, **options: Any) -> Any:
                return getattr(self._client, name)(*args, **options)

            return call

    clock = Clock()

    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    client = FakeClient(errors=[lost(), None, lost()])
    steps = acquire(target(), {}, 600.0, LOGGER, clock)
    assert asyncio.run(adrive(steps, AsyncFake(client), sleep)).name == BASE
    assert [kind for kind, _ in client.calls] == ["get", "get", "submit", "submit"]
