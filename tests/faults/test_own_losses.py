"""What counts as a server's own loss, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.case import Ended
from tests.faults.judges import LINES, Life
from tests.faults.own_losses import judge

TWICE = [*LINES[:250], *LINES[:250], *LINES[250:]]


def life(
    lines: list[str],
    reported: str | None,
    at_the_server: str,
    *,
    reason: str = "executor_error",
    runs: int = 1,
) -> Life:
    """Return a life: the lines and status that were delivered, and the final status on the server."""
    run: dict[str, Any] = {
        "status": at_the_server,
        "termination_reason": "job_failed",
        "jobs": [{"job_submissions": [{"termination_reason": reason}]}],
    }
    return Life(Ended(lines, reported, other_lines=["executor_error"]), [run] * runs, (), 1.0)


def test_nothing_is_lost_if_every_line_was_delivered() -> None:
    assert judge(life(LINES, "done", "done"), LINES) == ("", "")


def test_a_failure_reported_with_its_reason_and_all_lines_is_the_servers_own() -> None:
    flaw, loss = judge(life(LINES[:250], "failed", "failed"), LINES[:250])
    assert (flaw, loss) == (
        "",
        "the server failed the run: executor_error; its log holds the first 250 lines",
    )


def test_lines_that_the_servers_log_has_twice_are_doubled_by_the_server() -> None:
    flaw, loss = judge(life(TWICE, "done", "done"), TWICE)
    assert (flaw, loss) == ("", "the server's log holds 750 lines, 500 different")


def test_a_second_copy_that_the_server_did_not_return_is_not_missing() -> None:
    flaw, loss = judge(life([*LINES[:250], *LINES[10:250], *LINES[250:]], "done", "done"), TWICE)
    assert (flaw, loss) == ("", "the server's log holds 750 lines, 500 different")


@pytest.mark.parametrize(
    ("delivered", "logged"),
    [
        pytest.param(
            life([*LINES[:240], *LINES[:240], *LINES[250:]], "done", "done"), TWICE, id="ten lines lost"
        ),
        pytest.param(
            life([*LINES[10:250], *LINES[:250], *LINES[250:]], "done", "done"), TWICE, id="out of order"
        ),
        pytest.param(
            life([*TWICE, *LINES[:10]], "done", "done"), TWICE, id="delivered more often than logged"
        ),
        pytest.param(life(LINES[:240], "failed", "failed"), LINES[:250], id="ten lines of a failure lost"),
        pytest.param(life(TWICE, "done", "done"), LINES, id="doubled by the client"),
        pytest.param(life(LINES[:250], "done", "done"), LINES, id="lines lost by the client"),
        pytest.param(life(LINES[:200], "failed", "failed"), LINES[:250], id="the last lines not delivered"),
        pytest.param(life(LINES[:250], "failed", "failed", reason="other"), LINES[:250], id="other reason"),
        pytest.param(life(LINES[:250], "done", "failed"), LINES[:250], id="failure reported as success"),
        pytest.param(life(LINES[:250], "failed", "terminated"), LINES[:250], id="stopped by another user"),
        pytest.param(life(LINES, "done", "done", runs=2), LINES, id="two runs"),
    ],
)
def test_anything_else_is_a_flaw(delivered: Life, logged: list[str]) -> None:
    flaw, loss = judge(delivered, logged)
    assert flaw
    assert not loss
