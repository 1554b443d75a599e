"""What all command lines share: how long they wait for a server, and how they use a terminal.

The problem: the clients of tasks retry a server for minutes, and a person at a terminal takes a command that
is silent for ten seconds for broken. The same text goes to wide and narrow terminals, files and pipes.

The idea: the limits are here, for the core's command line and those of the hosts. Text is styled and cut to
the width only for a terminal. In a pipe or a file each row is whole and has no color.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from dstack_core.models.statuses import RunStatus

# Seconds for which an unreachable server is retried without a word: enough for its restart behind a proxy,
# and what a person waits before suspecting the command.
COMMAND_RETRY_SECONDS = 5.0
"""The retry budget, in seconds, of a command that a person types."""
# Seconds for a reply, unless the user configured them: the slowest healthy one, a page of 100 runs or a plan
# that asks several clouds, takes some seconds.
_REPLY_SECONDS = 15.0
# Seconds for a connection: a server on the other side of the world needs one; a dropped packet shows in five.
_CONNECT_SECONDS = 5.0
# The cells of a table are not made narrower than this; below it no cell can be recognized.
_NARROWEST_CELL = 8
_CODES = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}
# The states of findings, and the availability of offers; those of runs are in the table of statuses.
_STATE_COLORS = {
    "ok": "green",
    "available": "green",
    "idle": "green",
    "warning": "yellow",
    "error": "red",
    "skipped": "dim",
}


def command_limits(configured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of a ``Client`` for a command that a person types.

    With them a dead server is an error within about ten seconds, and one that accepts connections and does
    not answer within about twenty.

    Args:
        configured: What the user configured, such as ``{"timeout": 60}`` of a connection; it wins.

    Returns:
        ``timeout``, ``connect_timeout`` and ``retry_budget``, in seconds.
    """
    return {
        "timeout": _REPLY_SECONDS,
        "connect_timeout": _CONNECT_SECONDS,
        "retry_budget": COMMAND_RETRY_SECONDS,
        **(configured or {}),
    }


@dataclass(frozen=True, slots=True)
class TextStyle:
    """How text is written: with colors or without, and how wide.

    Attributes:
        color: Whether words are colored.
        width: The columns of the terminal; None: lines have any length.
    """

    color: bool = False
    width: int | None = None

    @classmethod
    def of(cls, stream: IO[str]) -> TextStyle:
        """Return the style for a stream: plain unless it is a terminal.

        ``NO_COLOR`` in the environment, with any value, switches colors off, and so does ``TERM=dumb``.
        ``COLUMNS`` sets the width. Source: no-color.org.
        """
        if not stream.isatty():
            return cls()
        color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(color, shutil.get_terminal_size().columns)

    def colored(self, text: str, color: str) -> str:
        """Return ``text`` (str) in ``color``: ``"green"``, ``"yellow"``, ``"red"``, ``"dim"``, ``"bold"``."""
        return f"\x1b[{_CODES[color]}m{text}\x1b[0m" if self.color and text.strip() else text

    def state(self, text: str) -> str:
        """Return a state or status (str) in its color; one that is not known has none."""
        color = _color_of(text.strip())
        return self.colored(text, color) if color else text


def _color_of(state: str) -> str | None:
    if state.upper() not in RunStatus.__members__:
        return _STATE_COLORS.get(state)
    status = RunStatus[state.upper()]
    if status.is_before_start or status.is_stopping:
        return "yellow"
    if status.is_active or status.is_success:
        return "green"
    return "dim" if status.was_stopped else "red"


PLAIN = TextStyle()
"""The style of text that no terminal shows."""


def text_table(
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    style: TextStyle = PLAIN,
    *,
    states: Sequence[int] = (),
    whole: Sequence[int] = (0,),
) -> str:
    """Return a table with two blanks between its columns, one line for each row.

    Args:
        head: The names of the columns.
        lines: The rows.
        style: How it is written; in a terminal that is too narrow, the widest cells are cut.
        states: The columns whose cells are colored as states.
        whole: The columns that are never cut, such as those of names to copy.
    """
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    widths = _fitting(widths, head, style.width, whole)
    shown = []
    for number, line in enumerate((head, *lines)):
        cells = []
        for column, cell in enumerate(line):
            text = _cut(cell, widths[column])
            padding = " " * (widths[column] - len(text)) if column < len(head) - 1 else ""
            if number == 0:
                text = style.colored(text, "bold")
            elif column in states:
                text = style.state(text)
            cells.append(text + padding)
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _fitting(widths: list[int], head: Sequence[str], most: int | None, whole: Sequence[int]) -> list[int]:
    """Return the widths, the widest ones reduced until the table fits or no cell can be cut further."""
    fitting = list(widths)
    if most is None:
        return fitting
    while sum(fitting) + 2 * (len(fitting) - 1) > most:
        cuttable = [
            column
            for column, width in enumerate(fitting)
            if column not in whole and width > max(_NARROWEST_CELL, len(head[column]))
        ]
        if not cuttable:
            break
        fitting[max(cuttable, key=lambda column: fitting[column])] -= 1
    return fitting


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
