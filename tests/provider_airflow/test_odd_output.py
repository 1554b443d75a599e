"""What programs write: bytes that are not text, progress bars, endless lines, a lot of it."""

from __future__ import annotations

import re

import pytest

from airflow_provider_dstack import operators
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, lines_in

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
_LONG = 1024 * 1024


@MODES
def test_odd_output_harms_no_task_and_reads_well(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    commands = [
        "sleep 3" if deferrable else "true",
        "echo 'odd-text ünï ☃ 漢字 🚀 %s {} 100%'",
        r"printf 'odd-bytes \377\376 end\n'",
        # One character in two writes, far enough apart for a poll in between.
        r"printf 'odd-split \342'; sleep 1; printf '\230\203 end\n'",
        r"printf 'odd-bar 10%%\rodd-bar 50%%\rodd-bar 100%%\n'",
        f"head -c {_LONG} /dev/zero | tr '\\0' x; echo",
        r"printf 'odd-nul \000 byte\n'",
        # The server keeps no escape sequences (PROTOCOL 1.8).
        r"printf 'odd-colour \033[1;31mred\033[0m end\n'",
        "printf 'odd-last without an end'",
    ]
    ended = dag_runner.run(
        f"configuration=Task(commands={commands!r}), poll_interval=0.2, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.state == "success"
    assert ("Pausing task as DEFERRED" in output) is deferrable
    assert lines_in(output, "odd-") == [
        "odd-text ünï ☃ 漢字 🚀 %s {} 100%",
        "odd-bytes \ufffd\ufffd end",
        "odd-split ☃ end",
        "odd-bar 100%",
        "odd-nul \ufffd byte",
        "odd-colour red end",
        "odd-last without an end",
    ]
    # A poll in the middle of the line gets it in pieces of 64 KiB, whose records end with 16 characters each.
    assert sum(map(len, re.findall("x{16,}", output))) == _LONG


@MODES
def test_a_log_of_five_megabytes_arrives_whole(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    from airflow_provider_dstack import _trigger_relay

    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    # The pace of a triggerer that others use too is a test of its own.
    monkeypatch.setattr(_trigger_relay, "_BYTES_PER_SECOND", 1e9)
    number = 50_000
    padding = "y" * 93
    command = f"{'sleep 2; ' if deferrable else ''}seq -f 'n%05g-{padding}' 1 {number}"
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command!r}]), poll_interval=0.2, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.state == "success"
    told = [int(found) for found in re.findall(rf"n(\d{{5}})-{padding}", output)]
    # The last lines are also what an error would quote; this task has none.
    assert told == list(range(1, number + 1))
