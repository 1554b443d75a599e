"""Find words and phrases that readers stumble over, in the pages and in the source files.

``RULES`` lists what not to write and what to write instead. Two groups of texts are searched:

* the pages: the Markdown files, without code blocks, code in backticks and link targets;
* the source: docstrings, comments, messages and test names of the Python files. A message is a string with at
  least three words; in ``tests/`` only strings that are raised, logged, printed or asserted count, because the
  others are data. An error for a wrong input also has a form, "expected ..., got ..." or "must ...".

``python -m tests.docs.voice`` prints how many findings each group has left, ``--show`` prints each finding, and
arguments limit the search to files or folders: ``python -m tests.docs.voice --show dstack_core/models``.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import PAGES as DOCS_PAGES
from tests.docs.blocks import ROOT

# docs/reference is generated from docstrings, so it belongs to the source.
PAGES = [
    *(page for page in DOCS_PAGES if page.parent.name != "reference"),
    ROOT / "CHANGELOG.md",
    ROOT / "tests/faults/reliability.md.in",
]
SOURCE_FOLDERS = (
    "dstack_core",
    "dstack_report",
    "providers",
    "dags",
    "flows",
    "scripts",
    "benchmarks",
    "tests",
)
# These two files quote what they search for.
_QUOTING = {ROOT / "tests/docs/voice.py", ROOT / "tests/docs/test_voice.py"}


@dataclass(frozen=True)
class Rule:
    """What not to write, as a regular expression, and what to write instead."""

    pattern: re.Pattern[str]
    instead: str


@dataclass(frozen=True)
class Passage:
    """A text that a person reads: its file, first line and kind."""

    path: Path
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Finding:
    """One place that breaks a rule."""

    passage: Passage
    line: int
    words: str
    instead: str

    def __str__(self) -> str:
        place = f"{self.passage.path.relative_to(ROOT)}:{self.line}"
        return f'{place}: {self.passage.kind}: "{self.words}": write {self.instead}.'


def _rule(pattern: str, instead: str) -> Rule:
    # A space in a pattern also matches a line break.
    return Rule(re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), instead)


RULES = [
    _rule(
        r"\b(?:a|an|the|each|every|another|one|two|no|first|last|next|this|that|many|their|its) looks?\b(?! (?:up|like))",
        "poll, status request or fetch",
    ),
    _rule(r"\blook(?:s|ed|ing)? (?:at|whether|if)\b", "poll, read or check"),
    _rule(r"\b(?:tell|tells|telling|told)\b", "report, return, log, show, notify or explain"),
    _rule(r"\b(?:say(?!,)|says|saying|said)\b", "report, state, log, show or name"),
    _rule(r"\b(?:borne|bears?|bearing)\b", "tolerate, retry for or keep retrying"),
    _rule(r"\bsilent (?:dstack )?server|\bserver (?:is|was|stays|that is) silent", "unreachable server"),
    _rule(r"\bspoil(?:s|ed|t|ing)?\b", "malformed or broken"),
    _rule(r"\b(?:is|are|was|were|been|be) over\b(?! (?:\d|the |a |an |ssh|http))", "has ended or finished"),
    _rule(r"\bcom(?:e|es|ing) to (?:its|their|an|the) end\b", "end or finish"),
    _rule(r"\b(?:go|goes|going|went|gone) on\b(?! (?:the|a|to) )", "keep running or continue"),
    _rule(r"\b(?:whoever|somebody|nobody)\b", "the caller, another process, the user or the server"),
    _rule(r"\bleads? (?:nowhere|somewhere|to no)\b", "be closed, or name the target"),
    _rule(r"\btak(?:e|es|en|ing) (?:the|its) watch(?:ing)? over\b", "take over or reattach"),
    _rule(
        r"(?<!there\s)\b(?:is|are|was|were) no (?!longer\b|more\b|need\b|other\b)\w+",
        "must be X, expected X, got Y, or is not a",
    ),
    _rule(r"(?<!there\s)\b(?:is|are|was|were) (?-i:none)\b", "must be X, or expected X, got none"),
    _rule(r"\bhow far (?:it|they|he|the \w+) (?:came|come|got|has|had|is)\b", "position, offset or cursor"),
    _rule(r"\bplace in (?:a|the|its|their) logs?\b", "log position or cursor"),
    _rule(r"\basked to (?:stop|end)\b", "stop request sent"),
    _rule(r"\ba run that may be left\b", "orphaned run"),
    _rule(r"\blast words\b|\bwords of (?:a|the) run\b", "log, or last lines"),
    _rule(r"\bas well as (?:can|may) be\b|\ball the same\b(?!,? (?:as|to))", "nothing, or still"),
    _rule(r"\bfor ever\b", "without limit, or forever"),
    # "Does Airflow not answer, the run ...": a question's word order and a comma, but no question mark.
    Rule(
        re.compile(
            r"(?:\A|(?<=[.;:]\s)|(?<=\n\n))\s*(?:Does|Did|Is|Are|Was|Were|Has|Had|Should)\s+"
            r"(?!true|None|set|raised|called)[\w`'\"][^.?!;]{2,150}?,\s[^.?!]*\."
        ),
        'a sentence that begins with "If"',
    ),
]
# The first word of a class's docstring: a class is a thing, so a noun names it.
CLASS_RULE = Rule(
    re.compile(r"\A\s*(?:Hold|Say|Be|Name|Tell|Know|Give|Keep|Note|Show|Take|Make|Answer|Stand|Pass)\b"),
    'a noun phrase ("A handle to one run.")',
)
# What an error for a wrong input contains. The embedded server's errors are those of a real server.
_FORM = re.compile(r"\bexpected\b|\bmust\b|\bcould not\b", re.IGNORECASE)
_FORM_ADVICE = '"<subject>: expected <what>, got <value>. <What to do next.>"'
_INPUT_ERRORS = {"ConfigurationError", "ValueError", "TypeError", "AirflowFailException"}
_OWN_FORM = ROOT / "dstack_core/local"
_FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``.+?``|`[^`\n]*(?:\n[^`\n]*)?`", re.DOTALL)
_TARGET = re.compile(r"\]\([^)]*\)|https?://\S+")
_WORDS = re.compile(r"[A-Za-z][a-z']+ [a-z']+.* [a-z']+", re.DOTALL)
_LOGGING = {
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "critical",
    "log",
    "warn",
    "fail",
    "print",
    "skip",
}


def _blanked(text: str) -> str:
    """Replace what is not prose by nothing a rule matches; line breaks stay, so that line numbers are right."""

    def blank(match: re.Match[str]) -> str:
        return "`" + "\n" * match[0].count("\n") + "`"

    for pattern in (_FENCE, _CODE, _TARGET):
        text = pattern.sub(blank, text)
    return text


def page_passages(page: Path) -> Iterator[Passage]:
    """Yield the prose of a Markdown page."""
    yield Passage(page, 1, "page", _blanked(page.read_text()))


def source_passages(path: Path) -> Iterator[Passage]:
    """Yield the docstrings, comments, messages and test names of a Python file."""
    text = path.read_text()
    tree = ast.parse(text)
    docstrings = list(_docstrings(path, tree))
    yield from (passage for _, passage in docstrings)
    yield from _comments(path, text)
    yield from _messages(path, tree, {id(node) for node, _ in docstrings})
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield Passage(path, node.lineno, "test name", node.name.replace("_", " "))


def _docstrings(path: Path, tree: ast.Module) -> Iterator[tuple[ast.AST, Passage]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            kind = "class docstring" if isinstance(node, ast.ClassDef) else "docstring"
            yield first.value, Passage(path, first.lineno, kind, _blanked(first.value.value))


def _comments(path: Path, text: str) -> Iterator[Passage]:
    """Yield each comment; lines of a comment that follow each other are one."""
    begun, last, lines = 0, -1, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("#!", "# noqa", "# type:", "# fmt:")):
            continue
        if lines and token.start[0] != last + 1:
            yield Passage(path, begun, "comment", _blanked("\n".join(lines)))
            lines = []
        begun = begun if lines else token.start[0]
        last = token.start[0]
        lines.append(token.string.lstrip("#").strip())
    if lines:
        yield Passage(path, begun, "comment", _blanked("\n".join(lines)))


def _messages(path: Path, tree: ast.Module, docstrings: set[int]) -> Iterator[Passage]:
    roots: Iterator[ast.AST] = iter([tree]) if path.relative_to(ROOT).parts[0] != "tests" else _spoken(tree)
    seen: set[int] = set()
    for root in roots:
        for node in _strings(root):
            if id(node) in docstrings or id(node) in seen:
                continue
            seen.add(id(node))
            text = _text_of(node)
            if _WORDS.search(text):
                yield Passage(path, node.lineno, "message", _blanked(text))


def _spoken(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what is raised, asserted, logged or printed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.exc
        elif isinstance(node, ast.Assert) and node.msg is not None:
            yield node.msg
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in _LOGGING:
                yield from node.args


def _strings(root: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """Yield the strings below a node, an f-string as one."""
    if isinstance(root, ast.JoinedStr) or (isinstance(root, ast.Constant) and isinstance(root.value, str)):
        yield root
        return
    for child in ast.iter_child_nodes(root):
        yield from _strings(child)


def _text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "`x`" for part in node.values)


def findings_in(passage: Passage) -> list[Finding]:
    """Return what breaks the rules in one text."""
    rules = [*RULES, CLASS_RULE] if passage.kind == "class docstring" else RULES
    found = [
        Finding(
            passage,
            passage.line + passage.text.count("\n", 0, match.start()),
            " ".join(match[0].split())[:60],
            rule.instead,
        )
        for rule in rules
        for match in rule.pattern.finditer(passage.text)
    ]
    return sorted(found, key=lambda one: one.line)


def page_findings(page: Path) -> list[Finding]:
    """Return what breaks the rules in a Markdown page."""
    return [found for passage in page_passages(page) for found in findings_in(passage)]


def source_findings(path: Path) -> list[Finding]:
    """Return what breaks the rules in a Python file."""
    return [
        *(found for passage in source_passages(path) for found in findings_in(passage)),
        *form_findings(path),
    ]


def form_findings(path: Path) -> list[Finding]:
    """Return the errors for a wrong input that do not name what was expected."""
    if path.is_relative_to(ROOT / "tests") or path.is_relative_to(_OWN_FORM):
        return []
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(raised, ast.Call) or not raised.args:
            continue
        name = getattr(raised.func, "attr", getattr(raised.func, "id", ""))
        text = "".join(_text_of(part) for part in _strings(raised.args[0]))
        if name in _INPUT_ERRORS and _WORDS.search(text) and not _FORM.search(text):
            passage = Passage(path, raised.lineno, "error form", text)
            found.append(Finding(passage, raised.lineno, " ".join(text.split())[:60], _FORM_ADVICE))
    return found


def source_files(*below: str) -> list[Path]:
    """Return the Python files of the repository, or those in some of its files and folders."""
    found: set[Path] = set()
    for name in below or SOURCE_FOLDERS:
        place = ROOT / name
        found.update([place] if place.is_file() else place.rglob("*.py"))
    return sorted(found - _QUOTING)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the number of findings of each file and the sums of each group."""
    parser = argparse.ArgumentParser(description="Count the words and phrases that readers stumble over.")
    parser.add_argument("places", nargs="*", help="Python files and folders; all, and the pages, by default")
    parser.add_argument("--show", action="store_true", help="print each finding")
    chosen = parser.parse_args(arguments)
    groups: list[tuple[str, dict[Path, list[Finding]]]] = []
    if not chosen.places:
        groups.append(("pages", {page: page_findings(page) for page in PAGES}))
    groups.append(("source", {path: source_findings(path) for path in source_files(*chosen.places)}))
    for group, found in groups:
        sys.stdout.write("\n".join(_report(group, found, show=chosen.show)) + "\n")


def _report(group: str, found: dict[Path, list[Finding]], *, show: bool) -> Iterator[str]:
    every = [one for findings in found.values() for one in findings]
    for path, findings in sorted(found.items(), key=lambda item: -len(item[1])):
        if findings:
            yield f"{len(findings):5} {path.relative_to(ROOT)}"
        if show:
            yield from (f"      {one}" for one in findings)
    folders = Counter(one.passage.path.relative_to(ROOT).parts[0] for one in every)
    kinds = Counter(one.passage.kind for one in every)
    yield f"{group}: {len(every)} in {sum(map(bool, found.values()))} of {len(found)} files"
    for title, counts in (("by folder", folders), ("by kind", kinds)):
        if len(counts) > 1:
            yield f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    main()
