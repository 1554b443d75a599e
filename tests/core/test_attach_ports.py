"""Local ports are checked before anything is sent; the error for a taken one names its process."""

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
from dstack_core._attach import ports
from dstack_core._attach.ports import bind, bind_from, verify_ports
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.errors import ConfigurationError, PortInUseError
from dstack_core.models.options import SubmitOptions
from tests.replaced import replace_in

HOLD = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as held:
    print(held.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process() -> Iterator[tuple[int, int]]:
    """Yield a port that another process listens on, and the id of that process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield int(process.stdout.readline()), process.pid
        process.stdin.close()


def test_the_error_for_a_taken_port_names_its_process_and_what_to_do(
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


def test_the_error_for_a_port_of_this_process_names_this_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held, pytest.raises(PortInUseError, match="this very"):
        verify_ports({held.getsockname()[1]: 80})


def without_owners(kind: str, look: Callable[..., Any] = psutil.net_connections) -> Any:
    return [connection._replace(pid=None) for connection in look(kind)]


def test_the_error_for_a_port_with_a_hidden_owner_explains_that_it_is_hidden(
    other_process: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "net_connections", without_owners)
    with pytest.raises(PortInUseError, match="taken by a process that this user cannot see") as caught:
        verify_ports({other_process[0]: 80})
    assert caught.value.pid is None


def test_the_error_for_a_privileged_port_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: tuple[str, int]) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    replace_in(monkeypatch, ports, "socket", create_server=refuse)
    with pytest.raises(
        ConfigurationError, match=r'a local port that this user may bind, got 80 .*"8080:80".*"\*:80"'
    ):
        verify_ports({80: 80})


def test_checking_a_port_leaves_it_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    verify_ports({port: 80})
    with bind(port, 80) as bound:
        assert bound.getsockname() == ("127.0.0.1", port)


def test_without_a_fixed_port_the_next_free_one_is_taken() -> None:
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


def test_submit_checks_ports_before_it_sends_and_only_with_verify_ports(
    other_process: tuple[int, int],
) -> None:
    port, pid = other_process
    # When the check fails, not even the flow has been created.
    with pytest.raises(PortInUseError, match=str(pid)):
        submit(port, verify=True)()
    submit(port, verify=False)()
    submit(f"*:{port}", verify=True)()


def test_clients_verify_ports_by_default(other_process: tuple[int, int]) -> None:
    port, _ = other_process
    nowhere: dict[str, Any] = {"server_url": "http://127.0.0.1:1", "project_name": "main", "user_token": "t"}
    task = dstack.Task(commands=["true"], ports=[port])
    with dstack.Client(**nowhere, retry_budget=0) as client:
        with pytest.raises(PortInUseError):
            client.runs.submit(task)
        with pytest.raises(dstack.ServerUnreachableError):
            client.runs.submit(task, verify_ports=False)
