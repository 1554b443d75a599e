"""Find the same place again in a job's output, raw as it was written or as the server keeps it."""

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
    """Count what was given out of one output: its bytes, its whole lines, and the line that is open."""

    def __init__(self) -> None:
        self.given = 0
        self._lines = 0
        self._open_line = bytearray()

    def replay(self) -> Replay:
        """Return what cuts the given bytes off the same raw output, sent from its beginning again."""
        return Replay(self)

    def rest(self) -> Rest:
        """Return what cuts the given lines off the server's copy, read from its beginning."""
        return Rest(self._lines, len(without_escapes(self._open_line)))

    def give(self, data: bytes) -> None:
        """Count ``data`` as given out."""
        self.given += len(data)
        self._lines += data.count(b"\n")
        line_end = data.rfind(b"\n")
        if line_end >= 0:
            self._open_line.clear()
        self._open_line += data[line_end + 1 :]


class Replay:
    """Pass over the bytes of a position."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._to_pass = position.given

    def fresh(self, data: bytes) -> bytes:
        """Return the part of ``data`` not given out before, and count it."""
        fresh = data[self._to_pass :]
        self._to_pass = max(0, self._to_pass - len(data))
        self._position.give(fresh)
        return fresh


class Rest:
    """Pass over whole lines, then over the beginning of the line behind them.

    The two texts differ in their escape sequences, so bytes cannot be counted.
    """

    def __init__(self, lines: int, open_bytes: int) -> None:
        self._lines = lines
        self._open_bytes = open_bytes

    def fresh(self, data: bytes) -> bytes:
        """Return the part of ``data`` not given out before."""
        while self._lines and data:
            _, end, data = data.partition(b"\n")
            self._lines -= bool(end)
        if self._lines:
            return b""
        passed = min(self._open_bytes, len(data))
        line_end = data.find(b"\n", 0, passed)
        if line_end >= 0:
            # The server's copy of the open line is shorter than what was given: only its end is new.
            self._open_bytes = 0
            return data[line_end:]
        self._open_bytes -= passed
        return data[passed:]


def without_escapes(data: bytes | bytearray) -> bytes:
    """Return ``data`` without terminal escape sequences."""
    return _ESCAPE.sub(b"", data)
