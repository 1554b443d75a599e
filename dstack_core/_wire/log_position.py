"""Find the same position again in a job's output, raw as it was written or as the server keeps it.

The problem: an attached run sends its raw output over SSH. When that connection breaks, the output comes
again from its beginning on the next one, or the rest must be read from the server's copy, in which the runner
has removed the escape sequences.

The idea: everything passed on is counted, in bytes and in lines (``Position``). The same raw output is
continued after so many bytes (``Replay``), the server's copy after so many lines and the beginning of the
open one (``Rest``), since line ends are in both.

Invariants: bytes are passed on in order, none twice. Memory grows only with the longest line.
"""

from __future__ import annotations

import re

# The runner takes these out of what it sends to the server (PROTOCOL 1.8, 4.6); one that is cut short at
# the end counts as well.
_ESCAPE = re.compile(
    rb"""\x1b(?: \[ [0-?]* [\x20-/]* (?: [@-~] | \Z )              # a control sequence, such as a colour
            | \] [^\x07\x1b]* (?: \x07 | \x1b\\ | \x1b? \Z )    # a command to the terminal, such as its title
            | [\x20-/]* (?: [0-Z\\^-~] | \Z )                  # all others
        )""",
    re.VERBOSE,
)


class Position:
    """The part of one output that was passed on: its bytes, its whole lines, and the line without an end."""

    def __init__(self) -> None:
        self.given = 0
        self._lines = 0
        self._open_line = bytearray()

    def replay(self) -> Replay:
        """Return a filter for the same raw output, sent from its beginning again."""
        return Replay(self)

    def rest(self) -> Rest:
        """Return a filter for the server's copy, read from its beginning."""
        # The server's copy of the open line has no escape sequences, so its length is compared without them.
        return Rest(self._lines, len(without_escapes(self._open_line)))

    def give(self, data: bytes) -> None:
        """Count ``data`` as passed on."""
        self.given += len(data)
        self._lines += data.count(b"\n")
        line_end = data.rfind(b"\n")
        if line_end >= 0:
            self._open_line.clear()
        self._open_line += data[line_end + 1 :]


class Replay:
    """A filter that drops the bytes of a position."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._to_pass = position.given

    def fresh(self, data: bytes) -> bytes:
        """Return the part of ``data`` that was not passed on before, and count it."""
        fresh = data[self._to_pass :]
        self._to_pass = max(0, self._to_pass - len(data))
        self._position.give(fresh)
        return fresh


class Rest:
    """A filter that drops whole lines, then the beginning of the line behind them.

    The two texts differ in their escape sequences, so bytes cannot be counted.
    """

    def __init__(self, lines: int, open_bytes: int) -> None:
        self._lines = lines
        self._open_bytes = open_bytes

    def fresh(self, data: bytes) -> bytes:
        """Return the part of ``data`` that was not passed on before."""
        while self._lines and data:
            # A line that the data only begins is dropped, but not counted: its end is still to come.
            _, end, data = data.partition(b"\n")
            self._lines -= bool(end)
        if self._lines:
            return b""
        passed = min(self._open_bytes, len(data))
        line_end = data.find(b"\n", 0, passed)
        if line_end >= 0:
            # The server's copy of the open line is shorter than what was passed on: only its end is new.
            self._open_bytes = 0
            return data[line_end:]
        self._open_bytes -= passed
        return data[passed:]


def without_escapes(data: bytes | bytearray) -> bytes:
    """Return ``data`` without terminal escape sequences."""
    return _ESCAPE.sub(b"", data)
