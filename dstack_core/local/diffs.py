"""Read a diff that git wrote, as strictly as dstack's runner does.

The runner applies diffs with a library, neither with git nor with patch, and differs from both:

* A fragment must match at exactly the line it names, byte for byte, in the file as the repository has it: no
  filters, no line endings of another system, no search in the lines around it.
* It knows regular files only. Where git creates a symbolic link, the library writes the link's target into a
  file without permissions.
* New lines without context end up one line above the place where git puts them.

A diff that git would apply can therefore fail on a real server. The embedded server must fail in the same
cases; otherwise a job passes here and breaks in production.

The parser reads line by line. Each file begins with ``diff --git``; header lines set names and modes; then
come fragments (``@@ -a,b +c,d @@``), which `fragments.replace_lines` applies, or one binary patch in base85,
which is the new content ("literal") or a delta of a Git pack ("delta").
Source: runner/internal/runner/repo/diff.go of dstack and the library go-gitdiff that it uses.
"""

from __future__ import annotations

import base64
import re
import zlib
from dataclasses import dataclass, field

from dstack_core.local.fragments import DiffError, Fragment, apply_delta, replace_lines

_NULL = b"/dev/null"
_ESCAPES = {b"a": 7, b"b": 8, b"t": 9, b"n": 10, b"v": 11, b"f": 12, b"r": 13, b'"': 34, b"\\": 92}
_FRAGMENT = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass
class Change:
    """The change of one file."""

    old_name: bytes = b""
    new_name: bytes = b""
    old_mode: int = 0
    new_mode: int = 0
    is_new: bool = False
    is_delete: bool = False
    is_rename: bool = False
    is_binary: bool = False
    fragments: list[Fragment] = field(default_factory=list)
    binary: tuple[bytes, bytes] | None = None

    def apply(self, content: bytes) -> bytes:
        """Return the new content; raises DiffError if the change does not fit the old one."""
        if not self.is_binary:
            return replace_lines(content, self.fragments)
        if self.binary is None:
            raise DiffError("binary file does not contain a binary fragment")
        method, data = self.binary
        return data if method == b"literal" else apply_delta(content, data)


def parse_diff(text: bytes) -> list[Change]:
    """Return the changes of a diff; raises DiffError if it is malformed."""
    return _Parser(re.findall(rb"[^\n]*\n|[^\n]+", text)).changes()


class _Parser:
    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self._at = 0

    @property
    def _line(self) -> bytes:
        return self._lines[self._at] if self._at < len(self._lines) else b""

    def changes(self) -> list[Change]:
        found = []
        while self._line:
            if _FRAGMENT.match(self._line):
                raise DiffError("patch fragment without file header")
            if not self._line.startswith(b"diff --git "):
                self._at += 1
                continue
            change = self._header()
            while match := _FRAGMENT.match(self._line):
                change.fragments.append(self._fragment(change, match))
            if not change.fragments:
                self._binary(change)
            found.append(change)
        return found

    def _header(self) -> Change:
        default = _default_name(self._line[len(b"diff --git ") :].rstrip(b"\n"))
        change = Change()
        self._at += 1
        while self._line and self._header_line(change, self._line.rstrip(b"\n"), default):
            self._at += 1
        if not change.old_name and not change.new_name:
            change.old_name = change.new_name = default
        if not (change.new_name or change.is_delete) or not (change.old_name or change.is_new):
            raise DiffError("git file header: missing filename information")
        return change

    def _header_line(self, change: Change, line: bytes, default: bytes) -> bool:
        """Read a line of the header; return False for the first line after the header."""
        key, value = _split_header(line)
        if key == b"--- ":
            name = _name(value, drop=True)
            if change.is_new and name != _NULL:
                raise DiffError("git file header: expected /dev/null")
            change.old_name = b"" if change.is_new else name
        elif key == b"+++ ":
            name = _name(value, drop=True)
            if change.is_delete and name != _NULL:
                raise DiffError("git file header: expected /dev/null")
            change.new_name = b"" if change.is_delete else name
        elif key in (b"old mode ", b"new mode ", b"deleted file mode ", b"new file mode "):
            mode = _number(value, 8)
            change.old_mode = mode if key in (b"old mode ", b"deleted file mode ") else change.old_mode
            change.new_mode = mode if key in (b"new mode ", b"new file mode ") else change.new_mode
            if key == b"deleted file mode ":
                change.is_delete, change.old_name = True, default
            elif key == b"new file mode ":
                change.is_new, change.new_name = True, default
        elif key in (b"rename from ", b"rename to ", b"copy from ", b"copy to "):
            change.is_rename = change.is_rename or key.startswith(b"rename")
            name = _name(value, drop=False)
            if key.endswith(b"from "):
                change.old_name = name
            else:
                change.new_name = name
        elif key == b"index ":
            _, _, mode_text = value.partition(b" ")
            change.old_mode = _number(mode_text, 8) if mode_text else change.old_mode
        return key is not None

    def _fragment(self, change: Change, match: re.Match[bytes]) -> Fragment:
        old, old_lines, new, new_lines = (1 if count is None else int(count) for count in match.groups())
        fragment = Fragment(old, old_lines, new, new_lines)
        if change.is_new and fragment.old_lines:
            raise DiffError("new file depends on old contents")
        if change.is_delete and fragment.new_lines:
            raise DiffError("deleted file still has contents")
        self._at += 1
        old, new = fragment.old_lines, fragment.new_lines
        while old > 0 or new > 0 or self._line.startswith(b"\\ "):
            operation, text = (self._line[:1], self._line[1:]) if self._line else (b"", b"")
            if operation == b"\\" and fragment.lines:
                kind, last = fragment.lines[-1]
                fragment.lines[-1] = (kind, last.removesuffix(b"\n"))
                self._at += 1
                continue
            if operation == b"\n":
                operation, text = b" ", b"\n"
            if operation not in (b" ", b"-", b"+"):
                raise DiffError(f"invalid line operation: {operation!r}")
            old -= operation != b"+"
            new -= operation != b"-"
            fragment.lines.append((operation, text))
            self._at += 1
        if old or new:
            raise DiffError("fragment header miscounts lines")
        if all(operation == b" " for operation, _ in fragment.lines):
            raise DiffError("fragment contains no changes")
        return fragment

    def _binary(self, change: Change) -> None:
        if self._line.startswith((b"Binary files ", b"Files ")) and self._line.endswith(b" differ\n"):
            change.is_binary = True
            self._at += 1
        if self._line != b"GIT binary patch\n":
            return
        change.is_binary = True
        self._at += 1
        change.binary = self._chunk()
        if change.binary is None:
            raise DiffError("missing data for binary patch")
        self._chunk()

    def _chunk(self) -> tuple[bytes, bytes] | None:
        method, _, size = self._line.rstrip(b"\n").partition(b" ")
        if method not in (b"literal", b"delta"):
            return None
        self._at += 1
        packed = b""
        while self._line not in (b"\n", b""):
            packed += _line_of_base85(self._line)
            self._at += 1
        self._at += 1
        try:
            data = zlib.decompress(packed)
        except zlib.error as error:
            raise DiffError(f"binary patch: {error}") from error
        if len(data) != _number(size, 10):
            raise DiffError("binary patch: its size differs from the size in its header")
        return method, data


def _line_of_base85(line: bytes) -> bytes:
    code = line[:1]
    count = code[0] - (64 if code.isupper() else 70)
    try:
        data = base64.b85decode(line[1:].rstrip(b"\n"))
    except ValueError as error:
        raise DiffError(f"binary patch: {error}") from error
    if not len(data) - 3 <= count <= len(data):
        raise DiffError("binary patch: incorrect byte count")
    return data[:count]


def _number(text: bytes, base: int) -> int:
    try:
        return int(text.strip(), base)
    except ValueError as error:
        raise DiffError(f"git file header: not a number: {text!r}") from error


_HEADERS = re.compile(
    rb"(--- |\+\+\+ |old mode |new mode |deleted file mode |new file mode |copy from |copy to "
    rb"|rename from |rename to |similarity index |dissimilarity index |index )"
)


def _split_header(line: bytes) -> tuple[bytes | None, bytes]:
    match = _HEADERS.match(line)
    return (None, b"") if match is None else (match[1], line[match.end() :])


def _unquoted(text: bytes) -> tuple[bytes, bytes]:
    """Return the quoted name at the beginning of ``text``, and what follows it."""
    match = re.match(rb'"((?:[^"\\]|\\.)*)"', text)
    if match is None:
        raise DiffError(f"git file header: bad quotes: {text!r}")

    def char(escape: re.Match[bytes]) -> bytes:
        code = escape[1]
        if len(code) == 3:
            return bytes([int(code, 8)])
        if code not in _ESCAPES:
            raise DiffError(f"git file header: bad quotes: {text!r}")
        return bytes([_ESCAPES[code]])

    return re.sub(rb"\\([0-3][0-7]{2}|.)", char, match[1]), text[match.end() :]


def _without_prefix(name: bytes) -> bytes:
    return name.partition(b"/")[2]


def _name(text: bytes, *, drop: bool) -> bytes:
    name = _unquoted(text)[0] if text.startswith(b'"') else (text.partition(b"\t")[0] if drop else text)
    if not name:
        raise DiffError("git file header: missing name")
    return name if name == _NULL or not drop else _without_prefix(name)


def _default_name(header: bytes) -> bytes:
    """Return the name that both sides have, or an empty one if they differ."""
    if header.startswith(b'"'):
        first, rest = _unquoted(header)
        rest = rest.lstrip(b" ")
        second = _unquoted(rest)[0] if rest.startswith(b'"') else rest
        names = _without_prefix(first), _without_prefix(second)
        return names[0] if names[0] == names[1] else b""
    # A name may contain spaces, so split in the middle: both halves name the same file.
    middle = len(header) // 2
    first, second = _without_prefix(header[:middle]), _without_prefix(header[middle + 1 :])
    return first if first == second else b""
