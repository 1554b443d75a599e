"""Interference of another user, or of another version of the server, with a run that is followed."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import httpx

from dstack_core.local import LocalServer
from tests.faults.case import Adapter
from tests.faults.judges import LINES, Life, clear_error, cut_short, policy, right_end
from tests.faults.proxy import Answer, Between, Forward

_REVOKED = b'{"detail": {"msg": "Invalid token", "code": null}}'
# Far more than any poll interval or page of a log covers, so a client that compares clocks would lose lines.
_SKEW = timedelta(minutes=10)
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)")
_ACTIVE = {"pending", "submitted", "provisioning", "pulling", "running", "terminating"}
# An upper bound for a busy machine; a wait returns as soon as the run is ready.
_SECONDS = 30.0
# From the first poll of the submitted run to the last request before the gate opens (`life.GATE_AT`).
_IN_THE_MIDDLE = range(4, 14)
# All steps, as `life.STEPS`.
_ALL = range(1, 17)


@dataclass
class Scene:
    """The place of an interference: request ``step``, or the first one after it that finds the run."""

    server: LocalServer
    name: str
    step: int
    happened: bool = False
    stranger: str | None = None


@dataclass(frozen=True)
class Interference:
    """A row of the table: what is done at which requests, and what must be true then.

    ``loses_a_reply``: the reply of request ``step`` is lost as well. ``ending`` is the job's last command.
    """

    name: str
    between: Callable[[Scene], Between]
    judge: Callable[[Adapter, Scene, Life], str]
    steps: Sequence[int] = _ALL
    loses_a_reply: bool = False
    ending: str = "true"


def _revoked(scene: Scene) -> Between:
    async def between(number: int, target: str, body: bytes, forward: Forward) -> Answer:
        if number < scene.step:
            return await forward(body)
        scene.happened = True
        return 403, _REVOKED

    return between


def _another_user(act: Callable[[Scene], None]) -> Callable[[Scene], Between]:
    def begin(scene: Scene) -> Between:
        # A client that no longer waits for the reply sends the next request while the act is in progress.
        one_at_a_time = asyncio.Lock()

        async def between(number: int, target: str, body: bytes, forward: Forward) -> Answer:
            if number >= scene.step:
                async with one_at_a_time:
                    if not scene.happened:
                        scene.happened = await asyncio.to_thread(_acts, act, scene)
            return await forward(body)

        return between

    return begin


def _acts(act: Callable[[Scene], None], scene: Scene) -> bool:
    with scene.server.client() as client:
        run = client.runs.get(scene.name)
        if run is None:
            return False
        run.stop(abort=True)
        run.wait(_SECONDS, poll_interval=0.02)
    act(scene)
    return True


def _delete(scene: Scene) -> None:
    url = f"{scene.server.url}/api/project/{scene.server.project}/runs/delete"
    headers = {"Authorization": f"Bearer {scene.server.token}"}
    httpx.post(url, json={"runs_names": [scene.name]}, headers=headers, timeout=_SECONDS).raise_for_status()


def _replace(commands: list[str], *, is_over: bool) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        with scene.server.client() as client:
            run = client.runs.submit(
                {"type": "task", "commands": commands}, scene.name, marker="a stranger's"
            )
            scene.stranger = run.id
            if is_over:
                run.wait(_SECONDS, poll_interval=0.02)
                return
            deadline = time.monotonic() + _SECONDS
            while run.refresh().raw_status != "running" and time.monotonic() < deadline:
                time.sleep(0.02)

    return act


def _rewriting(
    answer: Callable[[bytes], bytes], ask: Callable[[bytes], bytes] = lambda body: body
) -> Callable[[Scene], Between]:
    def begin(scene: Scene) -> Between:
        async def between(number: int, target: str, body: bytes, forward: Forward) -> Answer:
            scene.happened = True
            status, reply = await forward(ask(body))
            return status, answer(reply)

        return between

    return begin


def _json(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    """Return a function that changes every object of a reply; an empty reply stays as it is."""

    def rewrite(reply: bytes) -> bytes:
        return json.dumps(json.loads(reply, object_hook=change)).encode() if reply else reply

    return rewrite


def _with_fields(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"field_of_tomorrow": {"is": ["new", None, 7]}, "another": None}


def _with_statuses(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"status": "warming_up"} if item.get("status") in _ACTIVE else item


def _with_reasons(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"termination_reason": "cosmic_rays"} if item.get("termination_reason") else item


def _shifted(by: timedelta) -> Callable[[bytes], bytes]:
    def shift(found: re.Match[bytes]) -> bytes:
        moment = datetime.fromisoformat(found[0].decode()) + by
        return moment.isoformat(timespec="microseconds").replace("+00:00", "Z").encode()

    return lambda body: _TIME.sub(shift, body)


def _refused_at_once(adapter: Adapter, scene: Scene, life: Life) -> str:
    wrong = "" if "refused the token" in str(life.ended.error) else f"reported as {life.ended.error}"
    return clear_error(life) or wrong or policy(adapter, life)


def _ended_by_others(adapter: Adapter, scene: Scene, life: Life) -> str:
    """Judge a life whose run was aborted, then deleted or replaced by another user's run of the same name.

    A run is followed by its id, under which the server returns deleted runs too, so its end may be reported.
    """
    others = [run for run in life.runs if run["id"] == scene.stranger]
    ours = [run for run in life.runs if run["id"] != scene.stranger]
    if scene.stranger and [run["status"] for run in others] not in (["running"], ["done"]):
        return f"the other user's run is {[run['status'] for run in others]}"
    if len(ours) != 1:
        return f"{len(ours)} runs of our own"
    judge = cut_short if life.ended.status == "aborted" and life.ended.error is None else clear_error
    return judge(replace(life, runs=ours))


def _right(adapter: Adapter, scene: Scene, life: Life) -> str:
    return right_end(life)


def _failed(adapter: Adapter, scene: Scene, life: Life) -> str:
    """Judge a life that must end as a failed run, with all lines and the unchanged reason."""
    ended = life.ended
    if len(life.runs) != 1 or list(ended.lines) != LINES:
        return f"{len(life.runs)} runs, {len(ended.lines)} lines"
    if ended.error is None:
        return "" if ended.status == "failed" else f"ended as {ended.status}"
    return "" if "cosmic_rays" in str(ended.error) else f"{type(ended.error).__name__}: {ended.error}"


INTERFERENCES = (
    Interference("token revoked", _revoked, _refused_at_once),
    Interference("run stopped and deleted", _another_user(_delete), _ended_by_others, _IN_THE_MIDDLE),
    Interference(
        "run replaced by one that has ended",
        _another_user(_replace(["echo line-999"], is_over=True)),
        _ended_by_others,
        _IN_THE_MIDDLE,
    ),
    Interference(
        "run replaced by one that keeps running",
        _another_user(_replace(["echo line-999", "sleep 600"], is_over=False)),
        _ended_by_others,
        _IN_THE_MIDDLE,
    ),
    Interference("unknown fields", _rewriting(_json(_with_fields)), _right, loses_a_reply=True),
    Interference("unknown statuses", _rewriting(_json(_with_statuses)), _right, loses_a_reply=True),
    Interference(
        "unknown reasons of a run that fails",
        _rewriting(_json(_with_reasons)),
        _failed,
        loses_a_reply=True,
        ending="exit 3",
    ),
    Interference(
        "server's clock 10 minutes ahead",
        _rewriting(_shifted(_SKEW), _shifted(-_SKEW)),
        _right,
        loses_a_reply=True,
    ),
    Interference(
        "server's clock 10 minutes behind",
        _rewriting(_shifted(-_SKEW), _shifted(_SKEW)),
        _right,
        loses_a_reply=True,
    ),
)
