"""The parts of a diff and how they change a file: replaced lines, and binary deltas.

Lines: fragments are applied in the order of their lines, each exactly at the line that its header names.
Between two of them the old lines are copied. Every context line and every removed line must equal the old
line, byte for byte, and the file must not be longer or shorter than the fragment implies: `diffs` explains
why this is stricter than git.

Binary deltas have the format of a Git pack. A delta begins with two sizes, of the old and of the new content,
in 7 bits per byte, lowest first. Then come instructions: a byte below 0x80 inserts that many of the
bytes after it; one with 0x80 set copies a piece of the old content, and its other bits name which bytes of
the offset (4 bits) and of the length (3 bits) follow; a length of 0 means 0x10000.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class DiffError(Exception):
    """A diff that is malformed, or that does not fit the file."""


@dataclass
class Fragment:
    """Changed lines and their context; positions count from 1, and 0 is before the first line."""

    old: int
    old_lines: int
    new: int
    new_lines: int
    lines: list[tuple[bytes, bytes]] = field(default_factory=list)


def replace_lines(content: bytes, fragments: list[Fragment]) -> bytes:
    """Return the content with the fragments applied; raises DiffError if one does not match at its line."""
    source = content.split(b"\n")
    lines = [line + b"\n" for line in source[:-1]] + ([source[-1]] if source[-1] else [])
    out: list[bytes] = []
    done = 0
    for fragment in sorted(fragments, key=lambda one: one.old):
        start = max(fragment.old - 1, 0)
        if start < done:
            raise DiffError("conflict: fragment overlaps with an applied fragment")
        if fragment.old == 0 and content:
            raise DiffError("conflict: cannot create new file from non-empty src")
        if start + fragment.old_lines > len(lines):
            raise DiffError("conflict: src has fewer lines than required by fragment")
        out += lines[done:start]
        done = start
        for operation, text in fragment.lines:
            if operation != b"+":
                if lines[done] != text:
                    raise DiffError(f"conflict: fragment line does not match src line {done + 1}")
                done += 1
            if operation != b"-":
                out.append(text)
        if fragment.new == fragment.new_lines == 0 and done < len(lines):
            raise DiffError("conflict: src still has content after full delete")
    return b"".join(out + lines[done:])


def apply_delta(content: bytes, delta: bytes) -> bytes:
    """Return the content changed by a binary delta of a Git pack; raises DiffError if it does not fit."""
    position = 0

    def size() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = delta[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        if size() != len(content):
            raise DiffError("conflict: fragment src size does not match actual src size")
        wanted, out = size(), b""
        while position < len(delta):
            code = delta[position]
            position += 1
            if not code & 0x80:
                out += delta[position : position + code]
                position += code
                continue
            offset = length = 0
            for bit in range(7):
                if code & 1 << bit:
                    byte = delta[position]
                    position += 1
                    if bit < 4:
                        offset |= byte << 8 * bit
                    else:
                        length |= byte << 8 * (bit - 4)
            out += content[offset : offset + (length or 0x10000)]
    except IndexError as error:
        raise DiffError("corrupt binary delta") from error
    if len(out) != wanted:
        raise DiffError("corrupt binary delta: its size differs from the size in its header")
    return out
