"""Polled logs on both servers: attempts, start times, the runner's own log; nodes on the embedded one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import timedelta

import pytest

import dstack_core as dstack
from dstack_core import LogBytes
from tests.contract.conftest import Target


def test_logs_follow_a_run_and_name_their_source(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("for i in 1 2 3; do echo tick $i; sleep 0.5; done"))
    chunks = list(run.logs(follow=True, poll_interval=target.poll_interval))
    assert b"".join(chunks) == b"tick 1\r\ntick 2\r\ntick 3\r\n"
    assert all(isinstance(chunk, LogBytes) and chunk.node == chunk.attempt == 0 for chunk in chunks)
    assert len({chunk.submission_id for chunk in chunks}) == 1
    assert run.refresh().outcome() is not None
    last = chunks[-1].timestamp
    assert last is not None
    assert b"".join(run.logs(last)) == b"tick 3\r\n", "a message of the start time itself is included"
    assert b"".join(run.logs(last + timedelta(milliseconds=1))) == b""
    assert b"".join(run.logs(last.astimezone().replace(tzinfo=None))) == b"tick 3\r\n", (
        "a naive time is local"
    )
    assert b"".join(run.logs(diagnose=True)) != b"".join(run.logs())
    with pytest.raises(dstack.ConfigurationError, match=r"node: expected a node of run .*, got 1"):
        next(run.logs(node=1))


def test_all_attempts_of_a_retried_task_are_read(target: Target, client: dstack.Client) -> None:
    retry = {"on_events": ["error"], "duration": "1h"}
    run = client.runs.submit(target.task("echo trying", "sleep 0.5", "exit 1", retry=retry))
    attempts: list[int] = []
    for chunk in run.logs(follow=True, poll_interval=target.poll_interval):
        attempts += [chunk.attempt] * chunk.count(b"trying")
        if len(attempts) == 2:
            break
    target.stop(run)
    assert attempts == [0, 1]
    everything = b"".join(run.logs())
    assert everything.count(b"trying\r\n") >= 2


# Two nodes need two hosts, and the real server of these tests has one.
@pytest.mark.parametrize("target", ["local"], indirect=True)
def test_lines_of_two_nodes_do_not_mix(target: Target, client: dstack.Client) -> None:
    script = "for i in $(seq 40); do printf 'node %s ' $DSTACK_NODE_RANK; sleep 0.01; echo line $i; done"
    run = client.runs.submit(target.task(script, nodes=2))
    nodes: dict[int, bytes] = defaultdict(bytes)
    for chunk in run.logs(follow=True, poll_interval=0.02):
        assert chunk.endswith(b"\r\n"), "whole lines"
        nodes[chunk.node] += chunk
    assert run.status() is dstack.RunStatus.DONE
    alone = b"".join(run.logs(node=1))
    assert {node: log.decode().splitlines() for node, log in nodes.items()} == {
        node: [f"node {node} line {number}" for number in range(1, 41)] for node in (0, 1)
    }
    assert alone == nodes[1]


def test_the_async_twin_yields_the_same(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("echo hello"))
    run.wait(target.timeout, poll_interval=target.poll_interval)

    async def go() -> list[LogBytes]:
        async with target.async_client() as twin:
            same = await twin.runs.get(run.name)
            assert same is not None
            return [chunk async for chunk in same.logs()]

    chunks = list(run.logs())
    assert asyncio.run(go()) == chunks
    assert b"".join(chunks) == b"hello\r\n"
