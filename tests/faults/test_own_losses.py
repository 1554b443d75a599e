"""What counts as a server's own loss, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.case import Ended
from tests.faults.judges import LINES, Life
from tests.faults.own_losses import judge

TWICE = [*LINES[:250], *LINES[:250], *LINES[250:]]


def life(
    lines: list[str], told: str | None, says: str, *, reason: str = "executor_error", runs: int = 1
) -> Life:
    """Make a life: what was told, and what the server says in the end."""
    run: dict[str, Any] = {
        "status": says,
        "termination_reason": "job_failed",
        "jobs": [{"job_submissions": [{"termination_reason": reason}]}],
    }
    return Life(Ended(lines, told, told=["executor_error"]), [run] * runs, (), 1.0)


def test_nothing_is_lost_where_all_is_told() -> None:
    assert judge(life(LINES, "done", "done"), LINES) == ("", "")


def test_a_failure_is_the_servers_where_it_is_told_with_its_reason_and_all_lines() -> None:
    flaw, loss = judge(life(LINES[:250], "failed", "failed"), LINES[:250])
    assert (flaw, loss) == (
        "",
        "the server failed the run: executor_error; its log holds the first 250 lines",
    )


def test_lines_are_doubled_by_the_server_where_its_log_holds_them_so() -> None:
    flaw, loss = judge(life(TWICE, "done", "done"), TWICE)
    assert (flaw, loss) == ("", "the server's log holds 750 lines, 500 different")


def test_a_second_copy_that_the_server_did_not_show_is_not_missing() -> None:
    flaw, loss = judge(life([*LINES[:250], *LINES[10:250], *LINES[250:]], "done", "done"), TWICE)
    assert (flaw, loss) == ("", "the server's log holds 750 lines, 500 different")


@pytest.mark.parametrize(
    ("told", "logged"),
    [
        pytest.param(
            life([*LINES[:240], *LINES[:240], *LINES[250:]], "done", "done"), TWICE, id="ten lines lost"
        ),
        pytest.param(
            life([*LINES[10:250], *LINES[:250], *LINES[250:]], "done", "done"), TWICE, id="out of order"
        ),
        pytest.param(life([*TWICE, *LINES[:10]], "done", "done"), TWICE, id="told more often than logged"),
        pytest.param(life(LINES[:240], "failed", "failed"), LINES[:250], id="ten lines of a failure lost"),
        pytest.param(life(TWICE, "done", "done"), LINES, id="doubled by the client"),
        pytest.param(life(LINES[:250], "done", "done"), LINES, id="lines lost by the client"),
        pytest.param(life(LINES[:200], "failed", "failed"), LINES[:250], id="the last lines not told"),
        pytest.param(life(LINES[:250], "failed", "failed", reason="other"), LINES[:250], id="other reason"),
        pytest.param(life(LINES[:250], "done", "failed"), LINES[:250], id="failure told as success"),
        pytest.param(life(LINES[:250], "failed", "terminated"), LINES[:250], id="stopped by somebody"),
        pytest.param(life(LINES, "done", "done", runs=2), LINES, id="two runs"),
    ],
)
def test_anything_else_is_a_flaw(told: Life, logged: list[str]) -> None:
    flaw, loss = judge(told, logged)
    assert flaw
    assert not loss
