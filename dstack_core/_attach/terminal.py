"""A shell in a run's container, on the terminal of this process.

The problem: a person types into a terminal that this process shares with its shell, and the other side is a
channel inside several SSH connections.

The idea: with a terminal on both ends, the local one is put into raw mode, so that each key, Ctrl-C included,
goes to the container; without one, standard input, output and errors are copied as they are.

Invariant: the local terminal gets its settings back, whatever ends the shell.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

# Bytes to copy at once: two of the 32 KB packets that paramiko sends by default.
_COPY = 65536
# Seconds between two checks for a shell that has ended, without any input. Only the end of a shell whose
# input is a terminal waits for it.
_CHECK_SECONDS = 0.1
# What ``ssh`` returns if the connection, not the command, failed.
CONNECTION_LOST = 255


def run_shell(channel: paramiko.Channel, command: str | None) -> int:
    """Run a shell, or ``command``, until it ends; return its exit status, 255 if the connection was lost.

    Raises ``AttachError`` if the container starts none, or if this system has no terminals as POSIX does.
    """
    import paramiko

    if sys.platform == "win32":
        raise AttachError(
            "attach: expected Linux or macOS, whose terminals a shell needs, got Windows. Use it in WSL; "
            "run.attach() forwards ports on Windows, too."
        )

    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        if on_terminal:
            width, height = shutil.get_terminal_size()
            channel.get_pty(os.environ.get("TERM", "xterm"), width, height)
        if command is None:
            channel.invoke_shell()
        else:
            channel.exec_command(command)
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise AttachError(
            f"attach: expected a shell in the container, got {str(error) or type(error).__name__}. "
            "The run may have ended."
        ) from None
    with _raw_terminal(channel) if on_terminal else contextlib.nullcontext():
        threading.Thread(target=_send_input, args=(channel,), daemon=True).start()
        errors = threading.Thread(target=_copy, args=(channel.recv_stderr, sys.stderr.fileno()), daemon=True)
        errors.start()
        _copy(channel.recv, sys.stdout.fileno())
        errors.join()
    # Waits for the status, which follows the end of the output; -1 if the channel was closed without one.
    status = channel.recv_exit_status()
    return CONNECTION_LOST if status < 0 else status


@contextlib.contextmanager
def _raw_terminal(channel: paramiko.Channel) -> Iterator[None]:
    import termios
    import tty

    stdin = sys.stdin.fileno()
    settings = termios.tcgetattr(stdin)

    def resize(*_: object) -> None:
        width, height = shutil.get_terminal_size()
        with contextlib.suppress(OSError, EOFError):
            channel.resize_pty(width, height)

    before = signal.signal(signal.SIGWINCH, resize)
    # The default would throw away what was typed while the tunnel was opened.
    tty.setraw(stdin, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGWINCH, before)


def _send_input(channel: paramiko.Channel) -> None:
    stdin = sys.stdin.fileno()
    with contextlib.suppress(OSError, EOFError, ValueError):
        while not channel.closed:
            if not select.select([stdin], [], [], _CHECK_SECONDS)[0]:
                continue
            data = os.read(stdin, _COPY)
            if not data:
                channel.shutdown_write()
                return
            channel.sendall(data)


def _copy(read: Callable[[int], bytes], target: int) -> None:
    with contextlib.suppress(OSError, EOFError):
        while data := read(_COPY):
            while data:
                data = data[os.write(target, data) :]
