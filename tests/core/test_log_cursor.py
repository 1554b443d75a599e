"""The log cursor yields every line once and in order, however it is split into chunks and pages."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._wire.logs import LogMessages, Reader, parse_page, split_lines, start_time
from dstack_core.models.progress import LogCursor


def stamp(ms: int) -> str:
    return f"2026-11-23T09:30:00.{ms:03}000+00:00"


def ask(store: list[tuple[str, bytes]], cursor: LogCursor) -> LogMessages:
    """Answer as the server does, with messages strictly newer than start_time."""
    since = start_time(cursor)
    newer = [(at, data) for at, data in store if since is None or at > since]
    return LogMessages([at for at, _ in newer], [data for _, data in newer])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.binary(min_size=1, max_size=6)), max_size=30),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_no_message_is_lost_or_repeated_when_the_store_grows_between_reads(
    growth: list[tuple[int, bytes]], steps: list[int]
) -> None:
    store: list[tuple[str, bytes]] = []
    ms = 0
    for advance, data in growth:
        ms += advance
        store.append((stamp(ms), data))
    cursor, visible = LogCursor(), 0
    got: list[tuple[str, bytes]] = []
    while visible < len(store):
        visible = min(len(store), visible + steps[visible % len(steps)])
        reader = Reader(LogCursor(**json.loads(json.dumps(asdict(cursor)))))
        new = reader.take(ask(store[:visible], reader.cursor))
        got += zip(new.timestamps, new.chunks, strict=True)
        cursor = reader.cursor
    assert got == store


@given(st.text(alphabet="aé\U0001f680\n\r ", max_size=60), st.lists(st.integers(1, 9), min_size=1))
def test_lines_do_not_depend_on_where_the_chunks_were_cut(text: str, cuts: list[int]) -> None:
    data = text.replace("\n", "\r\n").encode()
    whole, _, _ = split_lines(LogCursor(), data, final=True)
    lines: list[str] = []
    cursor, at, turn = LogCursor(), 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        new, _, cursor = split_lines(cursor, data[at : at + size])
        lines += new
        at, turn = at + size, turn + 1
    last, _, _ = split_lines(cursor, b"", final=True)
    assert tuple(lines) + last == whole


def test_a_progress_bar_shows_its_last_state() -> None:
    lines, _, cursor = split_lines(LogCursor(), b" 10%\r 50%\r")
    assert lines == ()
    lines, _, cursor = split_lines(cursor, b"100%\r\nnext\r\n")
    assert lines == ("100%", "next")
    assert cursor.pending == ""


def test_bytes_that_are_not_utf_8_are_replaced_not_refused() -> None:
    lines, _, _ = split_lines(LogCursor(), b"a\xffb\n")
    assert lines == ("a\ufffdb",)


def test_output_without_line_ends_is_bounded() -> None:
    lines, _, cursor = split_lines(LogCursor(), "é".encode() * 100_000)
    assert "".join(lines).count("é") + 0 == sum(len(line) for line in lines)
    assert len(cursor.pending) < 100_000
    rest, _, _ = split_lines(cursor, b"", final=True)
    assert sum(len(line) for line in lines + rest) == 100_000


def test_an_empty_line_is_a_line() -> None:
    assert split_lines(LogCursor(), b"a\r\n\r\nb\r\n")[0] == ("a", "", "b")


@pytest.mark.parametrize("wrong", ["2026-13-01T00:00:00.000000Z", "2026-11-23T25:00:00.000000Z"])
@pytest.mark.parametrize("at", [0, 1])
def test_an_impossible_timestamp_is_an_error(wrong: str, at: int) -> None:
    stamps = ["2026-11-23T09:30:00.000001Z"] * 2
    stamps[at] = wrong
    with pytest.raises(ValueError, match="must be in"):
        parse_page({"logs": [{"timestamp": one, "message": ""} for one in stamps]})


@given(
    st.lists(
        st.tuples(
            st.datetimes(datetime(1970, 1, 1), timezones=st.just(UTC)),
            st.sampled_from(
                ["{:%Y-%m-%dT%H:%M:%S.%fZ}", "{:%Y-%m-%d %H:%M:%S.%f+00:00}", "{:%Y-%m-%dT%H:%M:%SZ}"]
            ),
        ),
        max_size=5,
    )
)
def test_timestamps_are_normalized_whatever_their_format(written: list[tuple[datetime, str]]) -> None:
    logs = [{"timestamp": form.format(moment), "message": ""} for moment, form in written]
    expected = [
        (moment if "%f" in form else moment.replace(microsecond=0)).isoformat(timespec="microseconds")
        for moment, form in written
    ]
    assert parse_page({"logs": logs}).messages.timestamps == expected
