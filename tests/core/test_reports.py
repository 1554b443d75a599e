"""Messages in the log of a run: the forms, what is broken, what is too large, and their way through pages."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from dataclasses import asdict
from typing import Any

import pytest

from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply
from dstack_core._wire.logs import most_kept, split_lines
from dstack_core._wire.reports import Dropped, Message, posix_checksum, take
from dstack_core.errors import ConfigurationError
from dstack_core.models.events import Event, LogLines, Reported, ReportsDropped, RunFinished
from dstack_core.models.outcome import NoResultError, Outcome, RunFailedError
from dstack_core.models.progress import LogCursor, Progress
from dstack_core.models.reports import DEFAULT_MAX_BYTES, MAX_IMAGE_BYTES, ReportLimits
from tests.core.scripted import Answer, Driver, Script, page, reply, run_json

API = Api("http://server", "main")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n rest").decode()


def short(kind: str, **fields: Any) -> str:
    return "::dstack::" + json.dumps({"kind": kind, **fields})


def parts(message: str, size: int = 3000, key: str = "k1") -> list[str]:
    """Write a message in parts, with the checksum of the command that users have."""
    data = message.encode()
    crc = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.split()[0].decode()
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    return [f"::dstack:{key}:{n}/{len(pieces)}:{crc}:{piece}" for n, piece in enumerate(pieces, 1)]


def split(*lines: str, end: str = "\r\n") -> tuple[tuple[str, ...], list[Any]]:
    data = "".join(line + end for line in lines).encode()
    shown, found, _ = split_lines(LogCursor(), data, final=True)
    return shown, found


def test_a_message_leaves_the_log() -> None:
    shown, found = split("one", short("metric", step=10, loss=0.3), "two")
    assert shown == ("one", "two")
    assert found == [Message("metric", {"step": 10, "loss": 0.3})]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("result", {"value": None}),
        ("result", {"value": {"ä": [1, 2.5, "x"]}}),
        ("metric", {"loss": 1}),
        ("metric", {"loss": "nan", "step": None}),
        ("progress", {"value": 0.5, "text": "epoch 1"}),
        ("progress", {"done": 3, "total": 10}),
        ("table", {"name": "scores", "columns": ["a"], "rows": [[1], [None]]}),
        ("link", {"url": "https://example.com"}),
        ("image", {"name": "curve", "png": PNG}),
        ("asset", {"uri": "s3://b/x", "metadata": {"rows": 3}}),
        ("checkpoint", {"path": "/vol/ckpt", "step": 3}),
        ("skip", {"reason": "no new data"}),
        ("of a newer version", {"anything": [1]}),
    ],
)
def test_each_kind_is_read(kind: str, fields: dict[str, Any]) -> None:
    assert split(short(kind, **fields)) == ((), [Message(kind, fields)])
    assert split(short(kind, **fields, v=1)) == ((), [Message(kind, fields)])


@pytest.mark.parametrize(
    "text",
    [
        "::dstack::{",
        '::dstack::{"kind": "metric", "loss": ',
        "::dstack::{}",
        '::dstack::{"kind": 3}',
        short("metric"),
        short("metric", loss="high"),
        short("metric", loss=True),
        short("metric", step="3", loss=1),
        short("result"),
        '::dstack::{"kind": "result", "value": NaN}',
        '::dstack::{"kind": "result", "value": 1e999}',
        short("progress", value=1.5),
        short("progress", done=3),
        short("progress", done=3, total=0),
        short("progress", value=0.5, text=3),
        short("table", name="x", columns=["a"], rows=[[1, 2]]),
        short("link", url=""),
        short("image", name="x", png="!"),
        short("image", name="x", png=base64.b64encode(b"GIF89a").decode()),
        short("asset", uri="x", metadata=[]),
        short("checkpoint"),
        short("skip"),
        short("metric", loss=1, v=2),
        "::dstack::" + '{"kind":"result","value":' + "[" * 5000 + "]" * 5000 + "}",
        '::dstack::{"kind":"result","value":' + "1" * 5000 + "}",
    ],
)
def test_a_broken_message_is_text_and_counted(text: str) -> None:
    assert split(text) == ((text,), [Dropped("broken")])


def test_what_only_looks_like_a_message_is_text() -> None:
    lines = ("::dstack:x", "::dstack::", "a::dstack:b", ":dstack::{}")
    assert split(*lines) == (lines, [])


def test_an_image_that_is_too_large_is_broken() -> None:
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(MAX_IMAGE_BYTES)).decode()
    shown, found = split(*parts(json.dumps({"kind": "image", "name": "x", "png": png})))
    assert found == [Dropped("broken")]
    assert [line[-6:] for line in shown] == [" [...]"]


def test_bytes_that_are_not_utf8_are_broken_not_changed() -> None:
    data = b'::dstack::{"kind": "skip", "reason": "\xff"}\n'
    lines, found, _ = split_lines(LogCursor(), data)
    assert (lines, found) == ((data.decode(errors="replace")[:-1],), [Dropped("broken")])


def test_nan_and_infinities_of_a_metric_are_names() -> None:
    shown, found = split('::dstack::{"kind":"metric","a":NaN,"b":Infinity,"c":-Infinity,"d":1e999}')
    assert found == [Message("metric", {"a": "nan", "b": "inf", "c": "-inf", "d": "inf"})]
    assert shown == ()


def test_text_around_a_message_stays() -> None:
    message = short("skip", reason="x")
    shown, found = split(f"Epoch 1: 30%{message} then", f"{message}{message}", f"a {message} b")
    assert shown == ("Epoch 1: 30% then", "a  b")
    assert len(found) == 4


def test_a_message_that_a_progress_bar_overwrites_is_kept() -> None:
    message = short("skip", reason="x")
    shown, found = split(f" 10%\r{message}\r 20%\r 30%", f"{message}\rdone")
    assert shown == (" 30%", "done")
    assert len(found) == 2


def test_an_open_line_keeps_its_message_until_it_ends() -> None:
    message = short("skip", reason="x")
    lines, found, cursor = split_lines(LogCursor(), f"{message}\r 20%".encode())
    assert (lines, found) == ((), [])
    lines, found, cursor = split_lines(cursor, b"\r 30%\r\n")
    assert (lines, len(found)) == ((" 30%",), 1)


def test_a_message_without_a_line_end_is_read_at_the_end() -> None:
    assert split_lines(LogCursor(), short("skip", reason="x").encode(), final=True)[:2] == (
        (),
        [Message("skip", {"reason": "x"})],
    )


def test_parts_make_a_message_among_other_lines() -> None:
    value = "ä" * 5000
    lines = parts(json.dumps({"kind": "result", "value": value}))
    assert len(lines) == 11
    mixed = [text for line in lines for text in ("noise", line)]
    shown, found = split(*mixed)
    assert shown == ("noise",) * 11
    assert found == [Message("result", {"value": value})]


def test_parts_may_be_in_base64() -> None:
    message = json.dumps({"kind": "result", "value": "ä" * 5000}, ensure_ascii=False)
    lines = parts(base64.b64encode(message.encode()).decode())
    assert split(*lines) == ((), [Message("result", {"value": "ä" * 5000})])
    (shown,), found = split(*parts("no message, and no base64 either" * 100))
    assert (shown[:20], found) == ("::dstack:no message,", [Dropped("broken")])


def test_parts_of_two_messages_may_interleave() -> None:
    first = parts(json.dumps({"kind": "result", "value": "a" * 7000}), key="a")
    second = parts(json.dumps({"kind": "result", "value": "b" * 7000}), key="b")
    lines = [line for pair in zip(first, second, strict=True) for line in pair]
    assert [message.payload["value"][0] for message in split(*lines)[1]] == ["a", "b"]


@pytest.mark.parametrize("change", ["lost", "first lost", "doubled", "altered", "unfinished", "again"])
def test_parts_that_are_broken_are_shown_and_counted(change: str) -> None:
    lines = parts(json.dumps({"kind": "result", "value": "a" * 7000}))
    match change:
        case "lost":
            del lines[1]
        case "first lost":
            del lines[0]
        case "doubled":
            lines.insert(1, lines[1])
        case "altered":
            lines[1] = lines[1].replace("a" * 10, "b" * 10, 1)
        case "unfinished":
            del lines[2:]
        case "again":
            lines = [lines[0], *lines]
    shown, found = split(*lines)
    assert Dropped("broken") in found
    assert any(line.startswith("::dstack:") for line in shown)
    assert [message for message in found if isinstance(message, Message)] == (
        [Message("result", {"value": "a" * 7000})] if change == "again" else []
    )


def test_what_is_too_large_is_left_out() -> None:
    big = json.dumps({"kind": "result", "value": "a" * 5000})
    data = "\n".join([*parts(big, 1000), short("skip", reason="y" * 5000), short("skip", reason="x"), ""])
    lines, found, cursor = split_lines(LogCursor(), data.encode(), max_bytes=4000)
    assert lines == ()
    assert found == [Dropped("too large"), Dropped("too large"), Message("skip", {"reason": "x"})]
    assert cursor.parts == {}
    between = json.dumps({"kind": "result", "value": "a" * 4100})
    found = split_lines(LogCursor(), "\n".join([*parts(between), ""]).encode(), max_bytes=4000)[1]
    assert found == [Dropped("too large")]


def test_unfinished_messages_are_bounded() -> None:
    opened = [parts(json.dumps({"kind": "x", "value": "a" * 5000}), key=f"k{n}")[0] for n in range(50)]
    lines, found, cursor = split_lines(LogCursor(), ("\n".join(opened) + "\n").encode())
    assert len(cursor.parts) == 32
    assert len(found) == len(lines) == 18


def test_the_checksum_is_that_of_the_command() -> None:
    source = random.Random(1)
    for size in (0, 1, 3, 255, 256, 70_000):
        data = source.randbytes(size)
        printed = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout
        assert posix_checksum(data) == int(printed.split()[0])


def test_any_cut_of_the_log_gives_the_same() -> None:
    source = random.Random(7)
    text = "\r\n".join(
        [
            "one",
            *parts(json.dumps({"kind": "result", "value": "é" * 3000})),
            short("metric", loss=1),
            " 10%\r" + short("skip", reason="x") + "\r 20%",
            "::dstack::{broken",
            "last",
        ]
    ).encode()
    whole = split_lines(LogCursor(), text, final=True)[:2]
    assert len(whole[1]) == 4
    for _ in range(50):
        cursor, at = LogCursor(), 0
        lines: list[str] = []
        found: list[Any] = []
        while at < len(text):
            size = source.randint(1, 4000)
            new, messages, cursor = split_lines(cursor, text[at : at + size], final=at + size >= len(text))
            # As another process would read it.
            cursor = LogCursor(**json.loads(json.dumps(asdict(cursor))))
            lines += new
            found += messages
            at += size
        assert (tuple(lines), found) == whole


def test_a_block_without_a_message_is_returned_as_it_is() -> None:
    block = b"a\r\nb\xff\r\n"
    assert take(block, {}, DEFAULT_MAX_BYTES) == (block, [], {})


@pytest.mark.parametrize("limits", [{"max_bytes": 10}, {"per_second": 0}, {"per_second": True}])
def test_wrong_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(limits))}: expected a whole number"):
        ReportLimits(**limits)


def test_more_messages_are_kept_of_a_longer_time() -> None:
    assert most_kept(10, None, "2026-11-23T09:30:00+00:00") == 600
    assert most_kept(10, "2026-11-23T09:30:00+00:00", "2026-11-23T09:30:00.5+00:00") == 10
    assert most_kept(10, "2026-11-23T09:30:00+00:00", "2026-11-23T09:30:05+00:00") == 50


def flow(driver: Driver, progress: Progress | None = None, **limits: int) -> Flow[Outcome]:
    options = FollowOptions(5, logs=True, wall_clock=driver.clock, report_limits=ReportLimits(**limits))
    return follow(API, progress or Progress("train", "id-1"), options)


MESSAGES = [
    (1, "start\r\n" + short("metric", loss=3) + "\r\n"),
    (2, short("metric", loss=2, step=1) + "\r\nmiddle\r\n"),
    (3, short("result", value={"score": 1}) + "\r\n"),
    (4, short("metric", loss="nan", accuracy=0.5) + "\r\nend\r\n"),
]


def finished(*messages: tuple[int, str], status: str = "done") -> Script:
    return Script(runs__get=[reply(run_json(status))], logs__poll=[page(*messages)])


def newer(*messages: tuple[int, str]) -> Answer:
    """Return a log page that leaves out what is not newer than the time asked for, as servers do."""

    def answer(body: dict[str, Any]) -> Reply:
        since = (body.get("start_time") or "")[17:26]
        return page(*(one for one in messages if f"{one[0] // 1000:02}.{one[0] % 1000:03}000" > since))

    return answer


def reported(events: list[Event]) -> list[Any]:
    """Return the messages and lines of events, in order."""
    return [
        item
        for event in events
        for item in (
            [event.payload]
            if isinstance(event, Reported)
            else list(event.lines)
            if isinstance(event, LogLines)
            else []
        )
    ]


def test_following_reports_messages_and_the_outcome_has_the_last(driver: Driver) -> None:
    events = driver.events(flow(driver), finished(*MESSAGES))
    assert [event.kind for event in events if isinstance(event, Reported)] == [
        "metric", "metric", "result", "metric",
    ]  # fmt: skip
    end = events[-1]
    assert isinstance(end, RunFinished)
    assert (end.outcome.has_result, end.outcome.result) == (True, {"score": 1})
    assert {name: str(value) for name, value in end.outcome.metrics.items()} == {
        "loss": "nan",
        "accuracy": "0.5",
    }
    again = Outcome.from_dict(json.loads(json.dumps(end.outcome.to_dict(), allow_nan=False)))
    assert str(again.metrics) == str(end.outcome.metrics)


@pytest.mark.parametrize("kind", ["metric", "progress"])
def test_a_run_that_reports_is_read_again_after_half_an_interval(driver: Driver, kind: str) -> None:
    message = short(kind, loss=1) if kind == "metric" else short(kind, value=0.5)
    pages = [(1, "a line\r\n"), (2, message + "\r\n"), (3, message + "\r\n")]
    # The fourth read comes before the server has fetched the log again.
    shown = (1, 2, 3, 3, 3, 3, 3)
    script = Script(
        runs__get=[reply(run_json(status)) for status in ["running"] * 5 + ["done"]],
        logs__poll=[newer(*pages[:n]) for n in shown],
    )
    driver.events(flow(driver), script)
    assert driver.clock.slept == [5, 2.5, 2.5, 2.5, 5]


def test_every_event_is_a_place_to_continue(driver: Driver) -> None:
    everything = reported(driver.events(flow(driver), finished(*MESSAGES)))
    events = driver.events(flow(driver), finished(*MESSAGES))
    for number, event in enumerate(events[:-1], 1):
        # In another process, whose first page is cut at each place.
        progress = Progress.from_dict(json.loads(json.dumps(event.progress.to_dict(), allow_nan=False)))
        for cut in range(1, len(MESSAGES) + 1):
            pages = [newer(*MESSAGES[:cut]), newer(*MESSAGES)]
            script = Script(runs__get=[reply(run_json("running")), reply(run_json("done"))], logs__poll=pages)
            rest = driver.events(flow(driver, progress), script)
            payloads = reported(events[:number]) + reported(rest)
            assert sorted(map(str, payloads)) == sorted(map(str, everything))
            end = rest[-1]
            assert isinstance(end, RunFinished)
            assert end.outcome.result == {"score": 1}


def test_a_flood_is_limited_and_counted(driver: Driver) -> None:
    flood = [(n, short("metric", loss=n) + "\r\n") for n in range(100)]
    script = Script(
        runs__get=[reply(run_json("running")), reply(run_json("done"))],
        logs__poll=[page((0, "first\r\n")), page((0, "first\r\n"), *flood, (100, short("result", value=1)))],
    )
    events = driver.events(flow(driver, per_second=10), script)
    assert [event.payload for event in events if isinstance(event, Reported)] == [
        *({"loss": n} for n in range(10)),
        {"value": 1},
    ]
    (dropped,) = [event for event in events if isinstance(event, ReportsDropped)]
    assert (dropped.reason, dropped.count, dropped.progress.reported.dropped) == ("too many", 90, 90)


def test_what_is_broken_is_reported_as_dropped(driver: Driver) -> None:
    events = driver.events(flow(driver), finished((1, "::dstack::{\r\n"), (2, "::dstack::{x\r\n")))
    (dropped,) = [event for event in events if isinstance(event, ReportsDropped)]
    assert (dropped.reason, dropped.count) == ("broken", 2)
    assert reported(events) == ["::dstack::{", "::dstack::{x"]


def results(driver: Driver, script: Script) -> Outcome:
    options = FollowOptions(5, logs=True, wall_clock=driver.clock, late_result=True)
    outcome: Outcome = driver.run(follow(API, Progress("train", "id-1"), options), script)
    return outcome


def test_a_late_result_is_waited_for(driver: Driver) -> None:
    late = Script(runs__get=[reply(run_json("done"))], logs__poll=[page(), page(), page(*MESSAGES)])
    assert results(driver, late).read_result() == {"score": 1}
    assert driver.clock.slept == [2, 2]


def test_each_event_comes_once_while_a_result_is_waited_for(driver: Driver) -> None:
    pages = [newer(*MESSAGES[:2]), newer(*MESSAGES[:2]), newer(*MESSAGES)]
    options = FollowOptions(5, logs=True, wall_clock=driver.clock, late_result=True)
    script = Script(runs__get=[reply(run_json("done"))], logs__poll=pages)
    events = driver.events(follow(API, Progress("train", "id-1"), options), script)
    once = driver.events(
        flow(driver), Script(runs__get=[reply(run_json("done"))], logs__poll=[newer(*MESSAGES)])
    )
    assert sorted(map(str, reported(events))) == sorted(map(str, reported(once)))
    assert [type(event).__name__ for event in events].count("RunFinished") == 1


def test_a_run_without_a_result_is_an_error(driver: Driver) -> None:
    with pytest.raises(NoResultError, match=r"reported no result.*DSTACK_RESULT_FILE"):
        results(driver, finished()).read_result()
    assert driver.clock.slept == [2, 2, 2]


def test_a_run_that_failed_has_its_own_error(driver: Driver) -> None:
    with pytest.raises(RunFailedError):
        results(driver, finished(status="failed")).read_result()
    assert driver.clock.slept == []
