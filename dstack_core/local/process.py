"""A job as a local process: a session of its own on a pseudo terminal.

A real runner runs commands on a terminal, so programs print colors and progress bars; the same must happen
here. Three steps lie between the process and the log:

1. The event loop reads the terminal when it is readable, without a thread.
2. `AnsiStripper` removes control sequences. A chunk may end inside a sequence; that part is held back.
3. Small pieces are gathered for `_GATHER_SECONDS` and handed on as one message.

The output ends when no process holds the terminal any longer. A background process can keep it open after the
command has exited. So `finish` first kills whatever is left of the job, then waits for the end of the output.
"""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dstack_core.local import reaper

# Bytes to read at once. Gathered output of this size is handed on, so a message has less than twice as much.
_READ = 65536
# How long to read the last output of a job that was killed. A terminal that is still open then is held by a
# process that could not be killed; what it writes is lost.
_DRAIN_SECONDS = 5.0
# A program may write thousands of small pieces a second, but two messages never share a millisecond: without
# gathering, their timestamps would run ahead of the clock. 2 ms means at most 500 messages a second.
_GATHER_SECONDS = 0.002
# The first terminal that a session leader opens becomes its controlling terminal. A shell opens it, because
# Popen's own hook for this runs Python between fork and exec, which is not safe beside threads.
OPEN_TERMINAL = 'exec "$@" <>"$0" >&0 2>&0'
_ANSI = re.compile(
    rb"""
    \x1b (?: \[ [0-?]* [\x20-/]* [@-~]                    # CSI: colors, cursor
           | \] [^\x07\x1b]* (?: \x07 | \x1b\\ )          # OSC: titles, links
           | [PX^_] [^\x1b]* \x1b\\                       # DCS, SOS, PM, APC
           | [\x20-/]+ [0-~]                              # character sets
           | [0-OQ-WYZ\\`-~] )                            # single functions
    """,
    re.VERBOSE,
)
# Bytes. An escape character that no sequence follows must not hold back the output without limit; links and
# titles, the longest sequences, are shorter.
_ANSI_LONGEST = 4096


class AnsiStripper:
    """A filter that removes terminal control sequences from a stream of chunks (PROTOCOL 1.8)."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the chunk without its sequences; an unfinished one is held back for the next chunk."""
        data = _ANSI.sub(b"", self._held + chunk)
        start = data.find(b"\x1b")
        if start < 0 or len(data) - start > _ANSI_LONGEST:
            self._held = b""
            return data
        data, self._held = data[:start], data[start:]
        return data

    def rest(self) -> bytes:
        """Return what is held back at the end of the stream."""
        data, self._held = self._held, b""
        return data


class PtyProcess:
    """A command on a pseudo terminal, whose output goes to a callback.

    Await `finish` at the end: it kills what the command left behind and reads the last output.
    """

    def __init__(self, on_output: Callable[[bytes], None], marker: str) -> None:
        self._on_output = on_output
        self._marker = marker
        self._ansi = AnsiStripper()
        self._ended = asyncio.Event()
        self._unsent = b""
        self._timer: asyncio.TimerHandle | None = None
        self._master = -1
        self._process: asyncio.subprocess.Process | None = None

    @property
    def started(self) -> bool:
        """Return whether there is a process."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Return the id of the process, which is also the id of its session."""
        assert self._process is not None  # noqa: S101 - start() comes first
        return self._process.pid

    async def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        """Start the command; raises OSError if the shell or the directory is missing."""
        self._master, slave = pty.openpty()
        try:
            terminal = os.ttyname(slave)
            self._process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", OPEN_TERMINAL, terminal, *argv,
                stdin=slave, stdout=slave, stderr=slave, env=dict(env), cwd=cwd, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._master)
            self._ended.set()
            raise
        finally:
            os.close(slave)
        os.set_blocking(self._master, False)
        asyncio.get_running_loop().add_reader(self._master, self._read)

    def _read(self) -> None:
        try:
            chunk = os.read(self._master, _READ)
        except BlockingIOError:
            return
        except OSError:  # EIO: no process holds the terminal any longer
            chunk = b""
        if not chunk:
            self._end_output()
            return
        self._unsent += self._ansi.feed(chunk)
        if len(self._unsent) >= _READ:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text, self._unsent = self._unsent, b""
        if text:
            self._on_output(text)

    def _end_output(self) -> None:
        # The terminal stays open: closing it is a hangup, which kills a process that merely closed its files.
        if not self._ended.is_set():
            asyncio.get_running_loop().remove_reader(self._master)
            self._unsent += self._ansi.rest()
            self._flush()
            self._ended.set()

    async def wait(self) -> int:
        """Return the exit status, or -1 if a signal ended the command itself (PROTOCOL 1.5)."""
        assert self._process is not None  # noqa: S101 - start() comes first
        status = await self._process.wait()
        return -1 if status < 0 else status

    def interrupt(self) -> None:
        """Send SIGINT to the process group of the command (PROTOCOL 1.7)."""
        try:
            os.killpg(self.pid, signal.SIGINT)
        except ProcessLookupError:
            return

    async def finish(self) -> None:
        """Kill what is left of the job, then read its output to the end."""
        if self._process is None:
            return
        try:
            await asyncio.to_thread(reaper.kill_all, [self.pid], self._marker)
            await self._process.wait()
            await asyncio.wait_for(self._ended.wait(), _DRAIN_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._end_output()
            if self._master >= 0:
                os.close(self._master)
                self._master = -1
