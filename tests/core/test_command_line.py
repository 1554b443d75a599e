"""All command lines: colors and widths of a terminal, plain text for everything else."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from dstack_core import CostRow
from dstack_core.integration import (
    Finding,
    RunRow,
    TextStyle,
    command_limits,
    cost_table,
    describe_finding,
    run_table,
)
from dstack_core.integration.command_line import text_table

HEAD = ("NAME", "STATUS", "OWNER")
LINES = [("train-3b0f92", "running", "airflow:nightly/manual__2026-11-27/train"), ("b", "failed", "-")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")


def test_tables_of_runs_and_costs_are_whole_unless_a_terminal_is_narrow() -> None:
    owner = f"airflow:etl/manual__2026-11-27T21:44:24.740481+00:00/{'t' * 60}/1of2"
    run = RunRow("run-1", "running", datetime.now(UTC), 1.0, owner, "")
    cost = CostRow(owner, 1, Decimal("1.0"))
    assert owner in run_table([run])
    assert owner in cost_table([cost])
    assert owner in run_table([run], style=TextStyle(width=300))
    assert max(map(len, run_table([run], style=TextStyle(width=80)).splitlines())) <= 80


def test_only_a_terminal_has_colors_and_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TextStyle.of(Terminal()) == TextStyle(color=True, width=60)
    assert TextStyle.of(io.StringIO()) == TextStyle(color=False, width=None)
    monkeypatch.setenv("NO_COLOR", "1")
    assert TextStyle.of(Terminal()) == TextStyle(color=False, width=60)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not TextStyle.of(Terminal()).color


def test_a_table_fits_into_a_narrow_terminal_and_is_whole_elsewhere() -> None:
    narrow = text_table(HEAD, LINES, TextStyle(width=40), whole=(0,)).splitlines()
    assert max(map(len, narrow)) == 40
    assert narrow[1].startswith("train-3b0f92  running  airflow:")
    assert narrow[1].endswith("…")
    assert text_table(HEAD, LINES).splitlines()[1].endswith("/train")
    # A name is copied, so it is never cut, however narrow the terminal is.
    assert text_table(HEAD, LINES, TextStyle(width=5), whole=(0,)).splitlines()[1].startswith("train-3b0f92")


def test_states_have_colors_that_do_not_shift_the_columns() -> None:
    plain = text_table(HEAD, LINES).splitlines()
    colored = text_table(HEAD, LINES, TextStyle(color=True), states=(1,)).splitlines()
    assert "\x1b[32mrunning\x1b[0m" in colored[1]
    assert "\x1b[31mfailed\x1b[0m" in colored[2]
    for code in ("\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"):
        colored = [line.replace(code, "") for line in colored]
    assert colored == plain


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("ok", 32), ("warning", 33), ("error", 31), ("skipped", 2), ("done", 32), ("provisioning", 33),
        ("terminating", 33), ("terminated", 2), ("available", 32),
    ],
)  # fmt: skip
def test_each_state_has_its_color(state: str, code: int) -> None:
    assert TextStyle(color=True).state(state) == f"\x1b[{code}m{state}\x1b[0m"
    assert TextStyle(color=True).state("something new") == "something new"
    assert TextStyle().state(state) == state


def test_a_finding_is_colored_by_its_state() -> None:
    finding = Finding("token", "error", "It is wrong.", "Copy it again.")
    assert describe_finding(finding, TextStyle(color=True)).startswith("\x1b[31merror   \x1b[0m token: ")
    assert describe_finding(finding) == "error    token: It is wrong.\n         -> Copy it again."


def test_what_the_user_configured_wins() -> None:
    assert command_limits({"timeout": 60.0})["timeout"] == 60.0
    assert command_limits()["retry_budget"] <= 5.0
