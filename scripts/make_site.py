"""Build the documentation site: stage the pages, run MkDocs on them, write ``llms.txt``, check the result.

``make docs`` runs it with the Python of the docs environment. The pages in the repository are written for a
reader of the repository: they link to files outside ``docs/``, and code blocks name the kind of test that
runs them. A copy in ``build/docs`` is what MkDocs needs. No code here depends on MkDocs, which runs as a
module.

The build makes no network connection: the process refuses any. The check rejects a page whose script, style,
font or image comes from another host, a link whose target or anchor is missing, and a list that became a
paragraph.
"""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

from scripts.check_site import check_site

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
# Where the pages' links to files outside docs/ lead on the site.
PAGES_OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
EXAMPLE_FOLDERS = ("dags", "flows")
_LANGUAGES = {"output": "text"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)$")
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples):$")
_ENTRY = re.compile(r"^    (?P<name>[*\w]+(?: \([^)]*\))?): (?P<text>.*)$")
_LIST_ITEM = re.compile(r"^ {0,3}(?:[*-]|\d+\.) ")
_LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def main() -> int:
    """Build the site; return the exit status of the process."""
    stage_pages()
    status = run_mkdocs()
    if status:
        return status
    write_llms_txt()
    problems = check_site(SITE)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"The site is in {SITE.relative_to(ROOT)}/; `make docs-serve` shows it.")
    return 1 if problems else 0


def stage_pages() -> None:
    """Copy the pages, images and examples, and the pages outside ``docs/``, to the staging folder."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(DOCS, STAGED)
    for source, target in PAGES_OUTSIDE.items():
        if target != "index.md":
            (STAGED / target).write_text(page_for_site(ROOT / source))
    for path in DOCS.rglob("*.md"):
        (STAGED / path.relative_to(DOCS)).write_text(page_for_site(path))
    for path in examples():
        copy = STAGED / "examples" / path.parent.name / f"{path.name}.md"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_example_page(path))


def examples() -> list[Path]:
    """Return the files of the complete examples."""
    return sorted(
        path for name in EXAMPLE_FOLDERS for path in (ROOT / name).iterdir() if path.suffix in (".py", ".yml")
    )


def page_for_site(page: Path) -> str:
    """Return a page of the repository as MkDocs needs it: fences, lists and links are converted."""
    lines: list[str] = []
    fence = ""
    for line in _without_sections(page.read_text().splitlines()):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found["indent"] + "```"
            language = found["info"].partition(" ")[0]
            lines.append(f"{fence}{_LANGUAGES.get(language, language)}")
            continue
        if found and line == fence:
            fence = ""
        elif not fence:
            # GitHub's Markdown starts a list after any line, Python-Markdown only after an empty line.
            if _LIST_ITEM.match(line) and lines and lines[-1].strip() and not _in_list(lines):
                lines.append("")
            line = _LINK.sub(lambda link: _link_for_site(page, link), line)
        lines.append(line)
    return "\n".join([*lines, ""])


def _without_sections(lines: list[str]) -> Iterator[str]:
    """Yield the lines, with the sections of docstrings as bold titles, lists and code."""
    section = ""
    for line in lines:
        found = _SECTION.match(line)
        if found:
            section = found[1]
            yield from ("", f"**{section}**", "")
        elif not section or (line and not line.startswith("    ")):
            section = ""
            yield line
        elif section in ("Args", "Raises") and (entry := _ENTRY.match(line)):
            yield f"* `{entry['name']}`: {entry['text']}"
        else:
            yield (f"  {line.strip()}" if section in ("Args", "Raises") else line[4:]).rstrip()


def _in_list(lines: list[str]) -> bool:
    """Return whether the last line belongs to a list item."""
    for line in reversed(lines):
        if _LIST_ITEM.match(line):
            return True
        if not line.startswith("  "):
            return False
    return False


def _link_for_site(page: Path, link: re.Match[str]) -> str:
    """Return a link as it is on the site: links to files outside ``docs/`` lead to their copies."""
    target = link["target"]
    if "://" in target or target.startswith("mailto:"):
        return link.group()
    path = (page.parent / target).resolve()
    up = "../" * len(page.relative_to(DOCS).parent.parts) if page.is_relative_to(DOCS) else ""
    anchor = link["anchor"] or ""
    if path.is_relative_to(DOCS):
        return link.group() if up or page.is_relative_to(DOCS) else f"]({path.relative_to(DOCS)}{anchor})"
    name = str(path.relative_to(ROOT))
    if name in PAGES_OUTSIDE:
        return f"]({up}{PAGES_OUTSIDE[name]}{anchor})"
    if path in examples():
        return f"]({up}examples/{name}.md{anchor})"
    return link.group()


def _example_page(path: Path) -> str:
    """Return the page that shows an example: its docstring, then its code."""
    code = path.read_text()
    language = "python" if path.suffix == ".py" else "yaml"
    about = (ast.get_docstring(ast.parse(code)) or "") if language == "python" else ""
    about = about.replace("``", "`")
    return f"# {path.parent.name}/{path.name}\n\n{about}\n\n```{language}\n{code}```\n"


def run_mkdocs() -> int:
    """Run MkDocs in this process, which makes no connection; return its exit status."""
    # Without --quiet, which would also hide warnings from --strict.
    arguments = ["mkdocs", "build", "--strict", "--clean", "--config-file", str(ROOT / "mkdocs.yml")]
    with (
        mock.patch.object(socket.socket, "connect", _refuse_connection),
        mock.patch.object(sys, "argv", arguments),
    ):
        try:
            runpy.run_module("mkdocs", run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def _refuse_connection(*_: object) -> NoReturn:
    raise OSError("make_site: expected a build without network access, got a connection")


def write_llms_txt() -> None:
    """Write ``llms.txt`` (see llmstxt.org) and, next to each page, the Markdown that it links to."""
    lines: list[str] = []
    for section, pages in sections():
        lines += ["", f"## {section}", ""]
        for page in pages:
            text = (STAGED / page).read_text()
            copy = SITE / page
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
            title, summary = title_and_summary(text)
            lines.append(f"- [{title}]({page}){': ' + summary if summary else ''}")
    name = re.search(r"^site_name: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    about = re.search(r"^site_description: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert name is not None  # noqa: S101 - the file is in this repository
    assert about is not None  # noqa: S101
    (SITE / "llms.txt").write_text("\n".join([f"# {name[1]}", "", f"> {about[1]}", *lines, ""]))


def sections() -> list[tuple[str, list[str]]]:
    """Return the sections of the navigation, in order, with their pages."""
    found: list[tuple[str, list[str]]] = []
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for line in nav.splitlines():
        if line.startswith("  - ") and line.endswith(":"):
            found.append((line[4:-1], []))
        elif line.strip().endswith(".md"):
            if line.startswith("  - "):
                found.append((line[4:].partition(":")[0], []))
            found[-1][1].append(line.split()[-1])
    return found


def title_and_summary(text: str) -> tuple[str, str]:
    """Return the title of a page and its first sentence, without links."""
    body = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    title, _, rest = body.partition("# ")[2].partition("\n")
    paragraph = next(
        (part for part in rest.split("\n\n") if part.strip() and not re.match(r"\s*[#`|!*<-]", part)), ""
    )
    plain = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph).split())
    return title.strip(), re.split(r"(?<=[.:])\s", plain, maxsplit=1)[0].rstrip(":")


if __name__ == "__main__":
    sys.exit(main())
