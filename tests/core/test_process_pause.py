"""After a pause of the process, such as a suspended machine, requests are held back for a moment."""

from __future__ import annotations

import asyncio

import pytest

from dstack_core._shared import process_pause
from dstack_core._shared.process_pause import PauseGuard
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core.errors import TransientServerError
from tests.core.test_shared import API
from tests.replaced import replace_in


def test_one_pause_guard_serves_all_clients_and_stops_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[str] = []
    monkeypatch.setattr(PauseGuard, "start", lambda _: guards.append("started"))
    monkeypatch.setattr(PauseGuard, "stop", lambda _: guards.append("stopped"))

    async def steps() -> None:
        settings = TransportSettings("http://127.0.0.1:9", "token")
        transports = [SharedTransport(settings) for _ in range(5)]
        for each in transports:
            with pytest.raises(TransientServerError):
                await each(API.stop("train", abort=False).request)
        for each in transports:
            await each.close()
            assert guards == ["started"] or each is transports[-1]
        assert guards == ["started", "stopped"]

    asyncio.run(steps())


@pytest.mark.parametrize(("late", "holds"), [(7.0, []), (60.0, [process_pause.PAUSE_SECONDS])])
def test_requests_right_after_a_pause_are_held_back(
    monkeypatch: pytest.MonkeyPatch, late: float, holds: list[float]
) -> None:
    now, slept = [1000.0], []

    async def asleep(seconds: float) -> None:
        slept.append(seconds)

    async def steps() -> None:
        guard = PauseGuard()
        guard.start()
        await guard.hold()
        now[0] += late
        guard._beat()
        replace_in(monkeypatch, process_pause, "asyncio", sleep=asleep)
        await guard.hold()
        now[0] += process_pause.PAUSE_SECONDS
        await guard.hold()
        guard.stop()
        assert guard._timer is None

    replace_in(monkeypatch, process_pause, "time", time=lambda: now[0])
    asyncio.run(steps())
    assert slept == holds
