"""The documented usage: submit, attach, read the log to its end or abort, detach."""

from __future__ import annotations

import io

import pytest

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.ports import free_port


def use(target: Target, out: io.BytesIO, command: str, interrupt_at: bytes | None) -> dstack.Run:
    """Do what the documented example does; a mark in the log stands for Ctrl-C."""
    task = dstack.Task(commands=[command], ports=[f"{free_port()}:80"], **target.needs)
    client = target.client()
    run = client.runs.submit(configuration=task, resources=dstack.Resources(memory="1GB"))
    assert (f"Run {run.name}: " + run.status()).startswith(f"Run {run.name}: ")
    run.attach(poll_interval=target.poll_interval, timeout=target.timeout)
    try:
        for log in run.logs(poll_interval=target.poll_interval):
            out.write(log)
            if interrupt_at is not None and interrupt_at in out.getvalue():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        run.stop(abort=True)
    finally:
        run.detach()
    return run


def test_the_log_is_read_to_the_end_of_the_run(target: Target) -> None:
    out = io.BytesIO()
    run = use(target, out, "for i in 1 2 3; do echo line $i; sleep 1; done", None)
    assert [line for line in out.getvalue().decode().splitlines() if line.startswith("line")] == [
        "line 1",
        "line 2",
        "line 3",
    ]
    assert run.wait(target.timeout, poll_interval=target.poll_interval).succeeded
    assert not run.is_attached


def test_an_interrupt_aborts_the_run(target: Target) -> None:
    run = use(target, io.BytesIO(), "echo ready; sleep 600", b"ready")
    assert target.stop(run, abort=True).status is dstack.RunStatus.ABORTED


def test_detaching_what_is_not_attached_does_nothing(target: Target) -> None:
    with target.client() as client:
        run = client.runs.submit(target.task("true"))
        run.detach()
        run.detach()
        assert (run.is_attached, dict(run.ports)) == (False, {})


def test_the_error_for_a_missing_node_names_it(target: Target) -> None:
    with target.client() as client:
        run = client.runs.submit(target.task("true"))
        with pytest.raises(dstack.ConfigurationError, match=r"node: expected a node of run .* \(0\), got 3"):
            run.attach(node=3)
