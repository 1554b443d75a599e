"""The log of a run in the log of its flow run, read back from Prefect's API."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import log_records
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_every_log_line_arrives_once_and_in_order(task: Any, credentials: DstackCredentials) -> None:
    count = 1500
    ids: list[UUID] = []
    command = (
        f"for i in $(seq {count}); do echo row-$i; [ $((i % 300)) = 0 ] && sleep 0.15; done; echo the-end"
    )

    @flow
    def talking() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit({"type": "task", "commands": [command]}, credentials, **FAST).result()

    talking()
    messages = log_records(ids[0], last="the-end")
    rows = [line for message in messages for line in message.split("\n") if line.startswith("row-")]
    assert rows == [f"row-{number}" for number in range(1, count + 1)]
    assert len(messages) < 60


def test_nothing_secret_is_logged(dstack: LocalServer, credentials: DstackCredentials) -> None:
    ids: list[UUID] = []

    @flow
    def secretive() -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task(Task(commands=["echo the-end"], env={"KEY": "env-s3cr3t"}), credentials, **FAST)

    secretive()
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert dstack.token not in told
    assert "env-s3cr3t" not in told


def test_a_line_that_is_too_long_for_prefect_arrives_in_pieces_and_the_others_whole(
    credentials: DstackCredentials,
) -> None:
    """Prefect Cloud refuses records above 25 000 characters, and the batch they are in."""
    ids: list[UUID] = []
    commands = ["echo before", "head -c 30000 /dev/zero | tr '\\0' y", "echo", "echo the-end"]

    @flow
    def talking() -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task({"type": "task", "commands": commands}, credentials, **FAST)

    talking()
    messages = log_records(ids[0], last="the-end")
    lines = [line for message in messages for line in message.split("\n")]
    pieces = [number for number, line in enumerate(lines) if line.startswith("yyy")]
    assert "".join(lines[number] for number in pieces) == "y" * 30_000
    assert len(pieces) == 2
    assert max(map(len, messages)) < 25_000
    assert [lines.index("before") + 1, lines.index("the-end") - 1] == pieces


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_lines_of_any_kind_are_fit_for_prefects_server(task: Any, credentials: DstackCredentials) -> None:
    ids: list[UUID] = []
    commands = [
        r"printf 'odd-nul \000 byte\n'",
        r"printf 'odd-colour \033[1;31mred\033[0m end\n'",
        r"printf 'odd-bytes \377\376 end\n'",
        "head -c 1048576 /dev/zero | tr '\\0' z; echo",
        "printf 'odd-text ☃ 漢字 %%s {} 100%% the-end'",
    ]

    @flow
    def talking() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit({"type": "task", "commands": commands}, credentials, **FAST).result()

    talking()
    messages = log_records(ids[0], last="the-end")
    lines = [line for message in messages for line in message.split("\n")]
    assert [line for line in lines if line.startswith("odd-")] == [
        "odd-nul \ufffd byte",
        "odd-colour red end",
        "odd-bytes \ufffd\ufffd end",
        "odd-text ☃ 漢字 %s {} 100% the-end",
    ]
    assert sum(len(line) for line in lines if re.fullmatch("z+", line)) == 1024 * 1024
    assert max(map(len, messages)) < 25_000
