"""The state of a line that has not ended (progress bars, prompts), and the time of each line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dstack_core import Event, LogLines, PartialLine, Progress
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.partial_lines import PartialLines
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core.integration import LogRelay
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import LogCursor
from tests.core.scripted import Driver, Script, page, reply, run_json

API = Api("http://server", "main")


def flow(driver: Driver, progress: Progress | None = None, *, timestamps: bool = False) -> Flow[Outcome]:
    options = FollowOptions(5, True, driver.clock, timestamps=timestamps)
    return follow(API, progress or Progress("train", "id-1"), options)


class Log:
    """A server whose log has at each read what ``write`` adds to it; each read is five seconds later."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.read = 0

    def __call__(self, body: dict[str, Any]) -> Any:
        number = int(body.get("next_token") or 0)
        if not number:
            self.read += 1
        since = (body.get("start_time") or "")[17:26]
        wanted = [
            (n, text)
            for n, text in enumerate(self.texts[: self.read], 1)
            if text and f"{n // 1000:02}.{n % 1000:03}000" > since
        ]
        return page(*wanted)


def script(log: Log, polls: int) -> Script:
    return Script(runs__get=[*[reply(run_json())] * polls, reply(run_json("done"))], logs__poll=[log])


def shown(events: list[Event]) -> list[str]:
    found = []
    for event in events:
        if isinstance(event, PartialLine):
            found.append(f"~{event.line}")
        elif isinstance(event, LogLines):
            found += event.lines
    return found


def bar(percent: int) -> str:
    return f"\r {percent}%|{'#' * (percent // 10)}|"


def test_a_progress_bar_shows_its_state_every_half_a_minute_and_its_line_once(driver: Driver) -> None:
    log = Log(*(bar(percent) for percent in range(25)), "\r100%|done\r\n")
    # Read at 0, 5, 10 s and so on: first after 10 s, then 30 s apart.
    assert shown(driver.events(flow(driver), script(log, 30))) == [
        "~ 2%||", "~ 8%||", "~ 14%|#|", "~ 20%|##|", "100%|done",
    ]  # fmt: skip


def test_a_prompt_that_stands_still_is_shown_once(driver: Driver) -> None:
    log = Log("loading\n", "Continue? [y/N] ")
    events = driver.events(flow(driver), script(log, 60))
    assert shown(events) == ["loading", "~Continue? [y/N] ", "Continue? [y/N] "]
    # In a process that takes over, too, also in one with a pause in between.
    (at,) = [number for number, event in enumerate(events) if isinstance(event, PartialLine)]
    wire = json.loads(json.dumps(events[at].progress.to_dict()))
    log.read = 2
    rest = driver.events(flow(driver, Progress.from_dict(wire)), script(log, 60))
    assert shown(rest) == ["Continue? [y/N] "]


def test_a_busy_log_that_is_read_within_lines_shows_none_of_them(driver: Driver) -> None:
    log = Log(*(f"end {number}\nbegin" for number in range(40)))
    events = driver.events(flow(driver), script(log, 40))
    assert not [event for event in events if isinstance(event, PartialLine)]
    assert shown(events) == ["end 0", *(f"beginend {number}" for number in range(1, 40)), "begin"]


def test_another_process_resumes_after_any_event_with_no_line_lost_or_repeated(driver: Driver) -> None:
    texts = ["a\n", *(bar(percent) for percent in range(0, 90, 4)), "\r100%\nb\n"]
    whole = driver.events(flow(driver), script(Log(*texts), 26))
    lines = [line for event in whole if isinstance(event, LogLines) for line in event.lines]
    assert lines == ["a", "100%", "b"]
    assert len([event for event in whole if isinstance(event, PartialLine)]) == 4
    for number, event in enumerate(whole[:-1]):
        log = Log(*texts)
        log.read = 20
        wire = json.loads(json.dumps(event.progress.to_dict()))
        rest = driver.events(flow(driver, Progress.from_dict(wire)), script(log, 26))
        both = [one for one in whole[: number + 1] + rest if isinstance(one, LogLines)]
        assert [line for one in both for line in one.lines] == lines


@pytest.mark.parametrize("text", ['::dstack::{"kind": "metr', "::dst", "a\r\r", ""])
def test_part_of_a_message_is_not_shown(driver: Driver, text: str) -> None:
    events = driver.events(flow(driver), script(Log("x\n", text), 20))
    assert [one.line for one in events if isinstance(one, PartialLine)] == (["a"] if text[:1] == "a" else [])


def partial(line: str, **fields: Any) -> PartialLine:
    return PartialLine(Progress("train"), line, 0, 0, 0, "s-1", **fields)


def test_a_relay_shows_the_state_as_text_and_hides_secrets_that_are_not_whole() -> None:
    relay = LogRelay(secrets=["hunter22"], log_budget_bytes=40)
    assert [text for _, text in relay.records(partial(" 45%|####   |\x1b[A"))] == [
        " 45%|####   | (still running)"
    ]
    assert [text for _, text in relay.records(partial("key: hunte", nodes=2))] == [
        "[node 0] key: (still running)"
    ]
    assert [text for _, text in relay.records(partial("key: hunter22"))] == ["key: *** (still running)"]
    ((_, text),) = relay.records(partial("x" * 9000))
    assert len(text) == len("x" * 500 + " (still running)")
    assert [text for line in ("", "  ", "hun") for _, text in relay.records(partial(line))] == []
    # It is not a line: neither the budget nor the last lines count it.
    assert relay.state() == {"tail": [], "relayed_bytes": 0, "left_out_bytes": 0}
    list(relay.records(LogLines(Progress("train"), ("y" * 50,), 0, 0, 0, "s-1")))
    assert list(relay.records(partial("after what is left out"))) == []
    assert list(LogRelay(shows_log=False).records(partial("50%"))) == []


MESSAGES = [(1, "a\nb"), (1, "c\n"), (2, ""), (1500, '::dstack::{"v":1}\nd\r\n'), (2000, "e")]


def test_each_line_has_the_time_of_the_message_with_its_end(driver: Driver) -> None:
    done = Script(runs__get=[reply(run_json("done"))], logs__poll=[page(*MESSAGES)])
    events = driver.events(flow(driver, timestamps=True), done)
    lines = [
        each for one in events if isinstance(one, LogLines) for each in zip(one.times, one.lines, strict=True)
    ]
    assert [(time[17:], line) for time, line in lines] == [
        ("00.001000+00:00", "a"),
        ("00.001000+00:00", "bc"),
        *([("01.500000+00:00", '::dstack::{"v":1}')] if len(lines) == 5 else []),
        ("01.500000+00:00", "d"),
        ("02.000000+00:00", "e"),
    ]
    without = driver.events(
        flow(driver), Script(runs__get=[reply(run_json("done"))], logs__poll=[page(*MESSAGES)])
    )
    assert [one.lines for one in without if isinstance(one, LogLines)] == [
        one.lines for one in events if isinstance(one, LogLines)
    ]
    assert all(one.times == () for one in without if isinstance(one, LogLines))


def test_a_relay_shows_the_time_before_each_line_but_not_in_an_error() -> None:
    relay = LogRelay()
    event = LogLines(
        Progress("train"), ("one", "two"), 0, 1, 0, "s-1", 2, 1,
        ("2026-11-23T09:30:00.125999+00:00", "2026-11-23T09:30:01.000000+00:00"),
    )  # fmt: skip
    assert [text for _, text in relay.records(event)] == [
        "2026-11-23T09:30:00.125Z [node 1] one\n2026-11-23T09:30:01.000Z [node 1] two"
    ]
    assert relay.tail == ["[node 1] one", "[node 1] two"]
    times = ("2026-11-23T09:30:02.500000+00:00",)
    assert [text for _, text in relay.records(partial("45%", times=times))] == [
        "2026-11-23T09:30:02.500Z 45% (still running)"
    ]


def test_a_line_that_was_open_at_a_takeover_is_due_at_once() -> None:
    opened = LogCursor(pending="DSA0MCU=")
    partial = PartialLines(lambda: 100.0, {"job": opened, "other": LogCursor()})
    assert partial.due("other", opened) is None
    reported = partial.due("job", opened)
    assert reported == replace(opened, shown=True)
    assert partial.due("job", opened) is None
    partial = PartialLines(lambda: 100.0, {"job": opened})
    partial.line_ended("job")
    assert partial.due("job", opened) is None
