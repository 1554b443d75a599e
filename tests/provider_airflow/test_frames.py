"""The frames in a run's log that carry what a function returned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_dstack._function import frame_key, read_frame
from airflow_provider_dstack._function_main import frame
from airflow_provider_dstack._log_relay import without_frames

KEY = frame_key("airflow:dag/run/task/1#id")
CONTENT = st.dictionaries(st.text(max_size=5), st.text(max_size=4000), max_size=4)


def log_of(lines: list[str]) -> bytes:
    return "".join(f"{line}\r\n" for line in lines).encode()


@given(content=CONTENT, before=st.text(max_size=30), size=st.integers(1, 5000))
def test_a_frame_is_read_whatever_is_around_it_and_however_it_comes(
    content: dict[str, str], before: str, size: int
) -> None:
    lines = [before, f"progress{frame(KEY, content)[0]}", *frame(KEY, content)[1:], "after"]
    data = log_of(lines)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert read_frame(chunks, KEY) == content


def test_the_last_whole_frame_counts() -> None:
    first, last = frame(KEY, {"n": 1}), frame(KEY, {"n": 2})
    torn = frame(KEY, {"n": "x" * 9000})[:2]
    assert read_frame([log_of([*first, *last, *torn])], KEY) == {"n": 2}


def test_a_frame_with_another_key_is_ignored() -> None:
    assert read_frame([log_of(frame("0" * 16, {"n": 1}))], KEY) is None
    assert read_frame([log_of(["@@dstack:nonsense", "@@dstack:"])], KEY) is None
    assert read_frame([], KEY) is None


def test_a_broken_frame_is_refused() -> None:
    whole = frame(KEY, {"n": "x" * 9000})
    with pytest.raises(ValueError, match="got a broken one"):
        read_frame([log_of([whole[0], whole[2], whole[-1]])], KEY)
    changed = whole[1].replace("e", "f", 1)
    with pytest.raises(ValueError, match="got a broken one"):
        read_frame([log_of([whole[0], changed, *whole[2:]])], KEY)


def test_frames_are_kept_out_of_the_tasks_log() -> None:
    (line,) = frame(KEY, {"n": 1})
    assert without_frames(line) is None
    assert without_frames(f"half a line{line}") == "half a line"
    assert without_frames("an @@dstack: of the user's own") == "an @@dstack: of the user's own"
    assert without_frames("") == ""
