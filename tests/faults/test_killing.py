"""Only the process that sent the request is killed."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys

import pytest

from tests.faults.killing import kill_client
from tests.ports import free_port

CONNECT = """
import socket, sys
from_port, to_port = map(int, sys.argv[1:])
with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.bind(("127.0.0.1", from_port))
    connection.connect(("127.0.0.1", to_port))
    connection.recv(1)
"""


def test_another_connection_from_the_same_port_is_left_alone() -> None:
    client = ("127.0.0.1", free_port())
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
        contextlib.ExitStack() as accepted,
    ):
        processes = []
        try:
            for server in (one, other):
                arguments = [str(client[1]), str(server.getsockname()[1])]
                processes.append(subprocess.Popen([sys.executable, "-c", CONNECT, *arguments]))
                accepted.enter_context(server.accept()[0])
            kill_client(client, other.getsockname())
            # Its exit status is not known here, because `kill_client` has waited for it.
            processes[1].wait(10)
            assert processes[0].poll() is None
        finally:
            for process in processes:
                process.kill()
                process.wait()


def test_kills_nothing_for_a_connection_of_this_process_or_of_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with (
            socket.create_connection(address) as mine,
            pytest.raises(RuntimeError, match="is held by"),
        ):
            kill_client(mine.getsockname(), address)
        with pytest.raises(RuntimeError, match="no process"):
            kill_client(("127.0.0.1", 1), address)
