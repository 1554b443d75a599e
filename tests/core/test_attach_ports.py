"""Local ports are bound before anything is sent, and a taken one names who has it."""

from __future__ import annotations

import errno
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

import dstack_core as dstack
from dstack_core._attach.ports import bind, bind_from, verify_ports
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.errors import ConfigurationError, PortInUseError
from dstack_core.models.options import SubmitOptions

HOLD = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as held:
    print(held.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process() -> Iterator[tuple[int, int]]:
    """Give a port that another process listens on, and the id of that process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield int(process.stdout.readline()), process.pid
        process.stdin.close()


def test_a_port_of_another_process_is_told_with_its_owner_and_the_ways_out(
    other_process: tuple[int, int],
) -> None:
    port, pid = other_process
    with pytest.raises(PortInUseError) as caught:
        verify_ports({port: 80})
    assert (caught.value.port, caught.value.pid) == (port, pid)
    name = psutil.Process(pid).name()
    assert f"the local port {port} is taken by process {pid} ({name})" in caught.value.message
    for way_out in ('"*:80"', f'"{port + 1}:80"', "verify_ports=False"):
        assert way_out in caught.value.message
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.port, again.pid) == (str(caught.value), port, pid)


def test_a_port_of_this_process_is_told_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held, pytest.raises(PortInUseError, match="this very"):
        verify_ports({held.getsockname()[1]: 80})


def no_right_to_look(kind: str) -> Any:
    raise psutil.AccessDenied


def without_owners(kind: str, look: Callable[..., Any] = psutil.net_connections) -> Any:
    return [connection._replace(pid=None) for connection in look(kind)]


@pytest.mark.parametrize("seen", [no_right_to_look, without_owners])
def test_an_owner_that_cannot_be_seen_is_told_as_such(
    other_process: tuple[int, int], monkeypatch: pytest.MonkeyPatch, seen: Callable[..., Any]
) -> None:
    monkeypatch.setattr(psutil, "net_connections", seen)
    with pytest.raises(PortInUseError, match="taken by a process that this user cannot see") as caught:
        verify_ports({other_process[0]: 80})
    assert caught.value.pid is None


def test_a_port_this_user_may_not_bind_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: tuple[str, int]) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(
        ConfigurationError, match=r'a local port that this user may bind, got 80 .*"8080:80".*"\*:80"'
    ):
        verify_ports({80: 80})


def test_free_ports_are_free_again_afterwards() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    verify_ports({port: 80})
    with bind(port, 80) as bound:
        assert bound.getsockname() == ("127.0.0.1", port)


def test_the_next_free_port_is_taken_where_any_will_do() -> None:
    with bind(0, 80) as held:
        port = held.getsockname()[1]
        with bind_from(port) as next_free:
            assert next_free.getsockname()[1] > port


def submit(port: int | str, verify: bool) -> Callable[[], object]:
    session = Operations(Api("http://127.0.0.1:1", "main"), retry_budget=0)
    task = dstack.Task(commands=["true"], ports=[port])
    return lambda: session.submit(
        task, None, SubmitOptions(), verify_ports=verify, marker=None, retry_budget=None
    )


def test_submit_checks_before_it_sends_and_only_when_asked_to(other_process: tuple[int, int]) -> None:
    port, pid = other_process
    # Not even the flow exists when the check fails.
    with pytest.raises(PortInUseError, match=str(pid)):
        submit(port, verify=True)()
    submit(port, verify=False)()
    submit(f"*:{port}", verify=True)()


def test_the_clients_verify_unless_told_otherwise(other_process: tuple[int, int]) -> None:
    port, _ = other_process
    nowhere: dict[str, Any] = {"server_url": "http://127.0.0.1:1", "project_name": "main", "user_token": "t"}
    task = dstack.Task(commands=["true"], ports=[port])
    with dstack.Client(**nowhere, retry_budget=0) as client:
        with pytest.raises(PortInUseError):
            client.runs.submit(task)
        with pytest.raises(dstack.ServerUnreachableError):
            client.runs.submit(task, verify_ports=False)
