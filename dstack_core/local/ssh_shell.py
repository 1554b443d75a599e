"""A shell in the "container" of a job: a process beside the job's own, in its directory and environment.

It carries the job's marker, so it ends with the job, as a shell in a container does. With a terminal the
client's keys reach a pseudo terminal, without one the output and errors of a command stay apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import paramiko

from dstack_core.local.process import OPEN_TERMINAL
from dstack_core.local.ssh_host import Place

# Bytes to copy at once: two of the 32 KB packets that paramiko sends by default.
_COPY = 65536
# Seconds. paramiko replies to the request after the handler has returned. A channel that ends before the
# reply fails the request at the client, so the process starts a moment later.
_REPLY_DELAY = 0.05


class Shell:
    """A shell or a command on one channel."""

    def __init__(self, channel: paramiko.Channel, place: Place) -> None:
        self._channel = channel
        self._place = place
        self._master: int | None = None
        self._term: str | None = None
        self._size = (80, 24)

    def use_terminal(self, term: str, width: int, height: int) -> None:
        """Give the process a terminal."""
        self._term, self._size = term, (width, height)

    def resize(self, width: int, height: int) -> None:
        """Change the size of the terminal."""
        self._size = (width, height)
        if self._master is not None:
            # Rows, columns, and two numbers of pixels that are not read.
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def start(self, command: str | None) -> None:
        """Start a command, or with None a shell, once the client has the reply to its request."""
        shell = next((path for path in ("/bin/bash", "/bin/sh") if Path(path).exists()), "/bin/sh")
        argv = [shell] if command is None else [shell, "-c", command]
        timer = threading.Timer(_REPLY_DELAY, self._run, (argv,))
        timer.daemon = True
        timer.start()

    def _run(self, argv: list[str]) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            try:
                status = self._piped(argv) if self._term is None else self._on_terminal(argv, self._term)
            except OSError as error:
                self._channel.sendall_stderr(f"The job has ended ({error.strerror}).\r\n".encode())
                status = 255
            self._channel.send_exit_status(status)
            self._channel.close()

    def _piped(self, argv: list[str]) -> int:
        with subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._place.directory,
            env=dict(self._place.environment),
            start_new_session=True,
        ) as process:
            pipes = (process.stdin, process.stdout, process.stderr)
            stdin, stdout, stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
            self._in_background(self._keys_to, stdin, process)
            errors = self._in_background(self._output_of, stderr, self._channel.sendall_stderr)
            self._output_of(stdout, self._channel.sendall)
            errors.join()
            return _exit_status(process.wait())

    def _on_terminal(self, argv: list[str], term: str) -> int:
        self._master, slave = pty.openpty()
        try:
            self.resize(*self._size)
            process = subprocess.Popen(
                ["/bin/sh", "-c", OPEN_TERMINAL, os.ttyname(slave), *argv],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=self._place.directory,
                env={**self._place.environment, "TERM": term},
                start_new_session=True,
            )
            os.close(slave)
            slave = -1
            self._in_background(self._keys_to, self._master, process)
            try:
                self._output_of(self._master, self._channel.sendall)
            finally:
                # Closing the terminal ends the shell of a client that is gone; without the wait it would
                # stay as a zombie.
                master, self._master = self._master, None
                os.close(master)
                status = process.wait()
            return _exit_status(status)
        except OSError:
            # The directory is gone: the job has ended.
            if self._master is not None:
                os.close(self._master)
                self._master = None
            raise
        finally:
            if slave >= 0:
                os.close(slave)

    def _keys_to(self, target: int, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := self._channel.recv(_COPY):
                while data:
                    data = data[os.write(target, data) :]
        if process.stdin is not None:
            # The client has no more input; only this ends a command that reads it.
            process.stdin.close()
        elif self._channel.closed or not self._channel.active:
            # The client is gone: as for a terminal that is closed. A shell for a person ignores SIGTERM.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGHUP)

    def _output_of(self, source: int, send: Callable[[bytes], object]) -> None:
        while True:
            try:
                data = os.read(source, _COPY)
            except OSError:  # EIO: no process holds the terminal any longer
                return
            if not data:
                return
            send(data)

    def _in_background(self, work: Callable[..., object], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        return thread


def _exit_status(status: int) -> int:
    return 128 - status if status < 0 else status
