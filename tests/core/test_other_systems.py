"""macOS and Windows, simulated by taking away what they lack: modules, functions, rights."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from dstack_core._attach import terminal
from dstack_core._attach.forwards import Forward
from dstack_core._attach.ports import verify_ports
from dstack_core.errors import AttachError, PortInUseError
from dstack_core.local import LocalServer

ROOT = Path(__file__).parent.parent.parent
# What the standard library of Windows lacks. The library itself imports it here, so only this project's
# imports are refused.
_WITHOUT_POSIX = """
import asyncio, builtins, os, shutil, signal, subprocess, sys, tempfile
LACKING = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
original = builtins.__import__

def refusing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name in LACKING and importer.startswith(("dstack_core", "dstack_report")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = refusing
for name in ("fork", "forkpty", "geteuid", "getpgid", "getsid", "getuid", "killpg", "setsid", "register_at_fork"):
    vars(os).pop(name, None)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGWINCH"):
    vars(signal).pop(name, None)
"""
_CLIENT = """
import dstack_core, dstack_core.integration, dstack_report
for name in dstack_core.__all__ + dstack_core.integration.__all__:
    getattr(dstack_core, name, None) or getattr(dstack_core.integration, name)
import dstack_core._command.main, dstack_core._attach.attachment, dstack_core._attach.ports

url, token = sys.argv[1:]
options = {"server_url": url, "project_name": "main", "user_token": token}

async def use():
    async with dstack_core.AsyncClient(**options) as client:
        run = await client.runs.submit(dstack_core.Task(commands=["echo async"]))
        return [line async for event in run.follow(poll_interval=0.05)
                if isinstance(event, dstack_core.LogLines) for line in event.lines]

with dstack_core.Client(**options) as client:
    run = client.runs.submit(dstack_core.Task(commands=["echo sync"]))
    print([line for event in run.follow(poll_interval=0.05)
           if isinstance(event, dstack_core.LogLines) for line in event.lines], run.wait().status)
    held = client.runs.submit(dstack_core.Task(commands=["sleep 300"]))
    held.stop()
print(asyncio.run(use()))
"""
_SERVER = """
from dstack_core.local import LocalServer
try:
    LocalServer().start()
except ImportError as error:
    print(error)
"""


def without_posix(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_POSIX + code, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_clients_work_without_what_windows_lacks() -> None:
    with LocalServer() as server:
        shown = without_posix(_CLIENT, server.url, server.token)
    assert "['sync']" in shown
    assert "['async']" in shown


def test_the_embedded_server_names_what_it_needs() -> None:
    assert without_posix(_SERVER).strip() == (
        "The embedded server runs jobs on pseudo terminals: expected Linux or macOS, got a system without the "
        "module fcntl. On Windows, start it in WSL; the clients work on Windows."
    )


def test_a_shell_on_windows_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    channel: Any = None
    with pytest.raises(AttachError, match=r"^attach: expected Linux or macOS.*got Windows\. Use it in WSL"):
        terminal.run_shell(channel, None)


class NotConnected(socket.socket):
    """A listening socket as outside Linux: it cannot be shut down."""

    def shutdown(self, how: int) -> None:
        raise OSError(errno.ENOTCONN, "Socket is not connected")


def test_a_forward_closes_where_a_listening_socket_cannot_be_shut_down() -> None:
    listening = NotConnected(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    nowhere: Any = None
    forward = Forward(listening, 80, nowhere)
    forward.start()
    closing = threading.Thread(target=forward.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


def denied(*_: object, **__: object) -> NoReturn:
    raise psutil.AccessDenied


def test_where_only_root_sees_all_sockets_an_own_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", denied)
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        pytest.raises(PortInUseError, match="taken by this very process"),
    ):
        verify_ports({held.getsockname()[1]: 80})


def test_where_only_root_sees_all_sockets_no_other_user_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", denied)
    monkeypatch.setattr(psutil, "process_iter", lambda: iter(()))
    with socket.create_server(("127.0.0.1", 0)) as held, pytest.raises(PortInUseError) as caught:
        verify_ports({held.getsockname()[1]: 80})
    assert "taken by another process; this system shows whose only to its administrator. " in str(
        caught.value
    )
    assert caught.value.pid is None


def test_a_process_that_hides_its_sockets_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        pid = 1
        net_connections = staticmethod(denied)

    monkeypatch.setattr(psutil, "net_connections", denied)
    monkeypatch.setattr(psutil, "process_iter", lambda: iter([Hidden(), psutil.Process()]))
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        pytest.raises(PortInUseError, match="this very process"),
    ):
        verify_ports({held.getsockname()[1]: 80})


def test_the_owner_of_a_socket_that_does_not_listen_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    with socket.create_server(("127.0.0.1", 0)) as held, pytest.raises(PortInUseError) as caught:
        verify_ports({held.getsockname()[1]: 80})
    assert "taken by another socket of this machine, whose process is not known. " in str(caught.value)
