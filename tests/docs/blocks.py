"""Find the code blocks of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "dstack_core" / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("providers/*/README.md"),
    ]
)
_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block; ``info`` is the text after the fence, ``outputs`` is the output that the page shows for it."""

    page: Path
    line: int
    info: str
    code: str
    outputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(info: str) -> list[Block]:
    """Return all blocks with that info, such as ``python`` or ``python airflow``."""
    return [block for block in every_block() if block.info == info]


def every_block() -> Iterator[Block]:
    """Yield all blocks of all pages."""
    for page in PAGES:
        yield from blocks_of(page)


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, each with its output.

    A block ``output`` belongs to the block it directly follows, otherwise to the last Python block before it.
    """
    text = page.read_text()
    matches = list(_BLOCK.finditer(text))
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match["info"].strip(), match["code"])
        for match in matches
    ]
    for number, block in enumerate(found):
        if block.info != "output":
            continue
        owner = number - 1
        if text[matches[owner].end() : matches[number].start()].strip() or found[owner].info == "output":
            owner = max(i for i in range(number) if found[i].info.startswith("python"))
        found[owner] = replace(found[owner], outputs=(*found[owner].outputs, block.code))
    return found


def check_outputs(block: Block, shown: str) -> None:
    """Check that the lines of a block's outputs were shown, in their order; ``...`` stands for any text."""
    rest = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for line in "".join(block.outputs).splitlines():
        pattern = ".*".join(re.escape(part) for part in line.split("..."))
        match = re.search(pattern, rest)
        assert match, f"{block}: expected {line!r} in the output, got:\n{shown}"
        rest = rest[match.end() :]
