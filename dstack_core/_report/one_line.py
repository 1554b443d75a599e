"""Write a shell script in one line.

A shell's error names a line ("sh: 3: train: not found"). What comes before a run's own commands must not be
counted there, so it is one line, and the first command of the user continues it. The line is a part of what
the shell shows of a syntax error in the user's first line, if it shows that line: bash without ``-i`` does,
which the embedded server starts, and no real server.
"""

from __future__ import annotations

# Behind these a command begins, and no semicolon may.
_OPEN = ("{", "(", "&&", "||", "|", "then", "else", "do", ";")


def one_line(script: str) -> str:
    """Return a script, which has no comments and no line break in quotes, as one line."""
    lines = [line.strip() for line in script.replace("\\\n", "").strip().splitlines()]
    parts = [f"{line} " if line.endswith(_OPEN) else f"{line}; " for line in lines[:-1]]
    return "".join([*parts, lines[-1]])
