"""The same position in a job's output is found again, in the raw stream or in the server's copy."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._wire.log_position import Position, without_escapes

PIECES = [
    b"line",
    "✓ é 日本".encode(),
    b"\r\n",
    b"\n",
    b"\r",
    b"\x1b[31mred\x1b[0m",
    b"\x1b[2K\x1b[1G",
    b"\x1b[?25l",
    b"\x1b]0;title\x07",
    b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
    b"\x1b(B",
    b"\x1bM",
    b"\x1b7",
]
RAW = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (b"\x1b[1;31mred\x1b[0m!", b"red!"),
        (b"\x1b]0;title\x07text\x1b]2;t\x1b\\.", b"text."),
        (b"\x1b(Bascii\x1b7\x1b8\x1bM", b"ascii"),
        (b"cut \x1b", b"cut "),
        (b"cut \x1b[3", b"cut "),
        (b"cut \x1b]0;ti", b"cut "),
        (b"array[0] (B) plain", b"array[0] (B) plain"),
    ],
)
def test_escape_sequences_are_removed_and_text_is_kept(raw: bytes, plain: bytes) -> None:
    assert without_escapes(raw) == plain


@given(RAW, st.integers(0, 400), st.lists(st.integers(0, 400)), st.lists(st.integers(0, 400)))
def test_a_stream_sent_again_yields_each_byte_once(
    raw: bytes, stop: int, first: list[int], second: list[int]
) -> None:
    position = Position()
    replay = position.replay()
    given_out = b"".join(replay.fresh(piece) for piece in chunks(raw[:stop], first))
    again = position.replay()
    given_out += b"".join(again.fresh(piece) for piece in chunks(raw, second))
    assert given_out == raw
    assert position.given == len(raw)


@given(RAW, st.integers(0, 400), st.lists(st.integers(0, 400)), st.lists(st.integers(0, 400)))
def test_the_servers_copy_continues_where_the_stream_was_cut(
    raw: bytes, stop: int, first: list[int], second: list[int]
) -> None:
    position = Position()
    replay = position.replay()
    live = b"".join(replay.fresh(piece) for piece in chunks(raw[:stop], first))
    rest = position.rest()
    polled = b"".join(rest.fresh(piece) for piece in chunks(without_escapes(raw), second))
    # The copy has no escape sequences, so the two can only be compared without them.
    assert without_escapes(live) + polled == without_escapes(raw)


def test_a_copy_whose_open_line_is_shorter_loses_no_line_after_it() -> None:
    position = Position()
    position.replay().fresh(b"one\ntwo and more")
    assert position.rest().fresh(b"one\ntwo\nthree\n") == b"\nthree\n"


def test_a_copy_that_lags_behind_yields_nothing_twice() -> None:
    position = Position()
    position.replay().fresh(b"one\ntwo\nthr")
    rest = position.rest()
    assert [rest.fresh(piece) for piece in (b"one\n", b"tw", b"o\nth", b"ree\nfour\n")] == [
        b"",
        b"",
        b"",
        b"ee\nfour\n",
    ]
