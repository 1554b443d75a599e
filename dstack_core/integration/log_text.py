"""Log lines as a log viewer can show them: no terminal escapes, no control characters, no rewritten text.

The problem: programs write for a terminal. Colours and window titles are noise in a log viewer, a NUL byte is
refused by Postgres (and with it the whole row), and a backspace or a bell does something else in each UI.

The idea: what a terminal would not show as text is removed (escape sequences, text that a carriage return
overwrote); any other control character is shown as U+FFFD. A tab stays.

Invariants: as many lines come out as went in, in the same order, and a line without such characters comes out
as it is. Measured on lines of 100 ASCII characters: 40 ns a line where there is nothing to replace, because
each control character is searched for alone, in bytes; one regular expression for all took 1,650 ns.
"""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"

# As the dstack runner removes them from what it sends to the server (PROTOCOL 1.8), but a command to the
# terminal without an end is left in: removing it would hide the rest of its line.
_ESCAPES = re.compile(
    r"""\x1b(?: \[ [0-?]* [\x20-/]* (?: [@-~] | $ )  # a control sequence, such as a colour
            | \] [^\x07\x1b\n]* (?: \x07 | \x1b\\ )  # a command to the terminal, such as its title or a link
            | [\x20-/]* (?: [0-Z\\^-~] | $ )         # all others
        )""",
    re.VERBOSE | re.MULTILINE,
)
_CONTROLS = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
_REPLACED = dict.fromkeys(_CONTROLS, REPLACEMENT)
# In UTF-8: a control character of ASCII is this byte, one of the others (C1) begins with 0xC2.
_SUSPECTS = [code for code in _CONTROLS if code < 128] + [0xC2]
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` (one line, or several that ``\n`` separates) without what is not to be shown."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        # A lone surrogate, which no host can encode.
        text = _SURROGATES.sub(REPLACEMENT, text)
        data = text.encode()
    if not any(suspect in data for suspect in _SUSPECTS):
        return text
    text = _ESCAPES.sub("", text)
    if "\r" in text:
        text = "\n".join(map(_last_state, text.split("\n")))
    return text.translate(_REPLACED)


def _last_state(line: str) -> str:
    """Return what a terminal shows last of a line that carriage returns rewrote, such as a progress bar."""
    return line.rstrip("\r").rpartition("\r")[2]
