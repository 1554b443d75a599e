"""Write the documentation of the submit options into the docstrings that explain each of them.

``make reference`` runs it. The text comes from ``dstack_core/models/options.py``. ``submit`` has it
word for word; where a workflow engine explains an option in its own words, these stay, and only options
that are not explained yet are added. So the text is in the source, where an IDE finds it, and written once.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ROOT / "dstack_core" / "models" / "options.py"
_WIDTH = 110


@dataclass(frozen=True)
class Target:
    """A docstring with an ``Args:`` section; ``renamed`` lists the options that have another name there."""

    path: Path
    name: str
    is_exact: bool = False
    renamed: dict[str, str] = field(default_factory=dict)


TARGETS = [
    Target(ROOT / "dstack_core" / "client.py", "RunCollection.submit", is_exact=True),
    Target(
        ROOT / "providers/airflow/src/airflow_provider_dstack/operators.py",
        "DstackRunOperator",
        renamed={"resources": "run_resources", "retry_policy": "run_retry_policy"},
    ),
    Target(ROOT / "providers/prefect/src/prefect_dstack/tasks.py", "run_task"),
]


def main() -> None:
    """Write every target."""
    for target in TARGETS:
        if (text := render(target)) != target.path.read_text():
            target.path.write_text(text)


def explanations() -> dict[str, str]:
    """Return what each option means, by its name, as one line."""
    found: dict[str, str] = {}
    for kind in ast.parse(OPTIONS.read_text()).body:
        if not isinstance(kind, ast.ClassDef):
            continue
        for entry, text in zip(kind.body, [*kind.body[1:], None], strict=True):
            if not (isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)):
                continue
            if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                raise SystemExit(
                    f"{entry.target.id}: expected an explanation below it, got none. See {OPTIONS}."
                )
            found[entry.target.id] = " ".join(str(text.value.value).split())
    return found


def render(target: Target) -> str:
    """Return the text of the target's file with every option explained."""
    lines = target.path.read_text().splitlines()
    first, last = _docstring(target)
    start = next(number for number in range(first, last) if lines[number].strip() == "Args:")
    indent = lines[start][: -len(lines[start].lstrip())] + "    "
    end = next(n for n in range(start + 1, last + 1) if not lines[n].startswith(indent))
    entries = _entries(lines[start + 1 : end], indent)
    texts = {target.renamed.get(name, name): text for name, text in explanations().items()}
    for name, text in texts.items():
        if name not in entries:
            entries = _with(
                entries, name, _wrapped(name, text, indent), [each for each in texts if each != name]
            )
        elif target.is_exact:
            entries[name] = _wrapped(name, text, indent)
    written = [line for entry in entries.values() for line in entry]
    return "\n".join([*lines[: start + 1], *written, *lines[end:], ""])


def _docstring(target: Target) -> tuple[int, int]:
    """Return the first and the last line of the docstring, counted from 0."""
    body: list[ast.stmt] = ast.parse(target.path.read_text()).body
    found: ast.ClassDef | ast.FunctionDef | None = None
    for part in target.name.split("."):
        kinds = (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
        found = next(node for node in kinds if node.name == part)
        body = found.body
    return body[0].lineno - 1, (body[0].end_lineno or 0) - 1


def _entries(lines: list[str], indent: str) -> dict[str, list[str]]:
    entries: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        start = re.match(rf"{indent}([\w*][\w*, ]*): ", line)
        name = start[1] if start else name
        entries.setdefault(name, []).append(line)
    return entries


def _with(
    entries: dict[str, list[str]], name: str, text: list[str], options: list[str]
) -> dict[str, list[str]]:
    """Return the entries with one more, after the last entry of an option."""
    last = max(number for number, each in enumerate(entries, 1) if each in options)
    items = list(entries.items())
    return dict([*items[:last], (name, text), *items[last:]])


def _wrapped(name: str, text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        f"{name}: {text}",
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    main()
