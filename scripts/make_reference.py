"""Write the reference pages in docs/reference/ from the signatures and docstrings of the code.

``make reference`` runs it; a test fails if the pages differ from the code.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

from scripts import failure_page, option_docs
from scripts.reference_pages import PAGES, Page

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
SOURCES = [ROOT, ROOT / "providers" / "airflow" / "src", ROOT / "providers" / "prefect" / "src"]
PACKAGES = ("dstack_core", "airflow_provider_dstack", "prefect_dstack")
_SIGNATURE_WIDTH = 100
# The sections of a docstring, in Google's style: lists of entries, plain text, and code.
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example):{1,2}")
_LISTS = {"Args", "Attributes", "Raises"}
_ENTRY = re.compile(r"(?P<names>[\w*][\w*, ]*): (?P<text>.*)")
_PREFIXES = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}


def main() -> None:
    """Write the docstrings that explain options, then every page; remove obsolete pages."""
    option_docs.main()
    FOLDER.mkdir(exist_ok=True)
    wanted = render_all()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)


def render_all() -> dict[str, str]:
    """Return the text of every page by its file name."""
    loader = griffe.GriffeLoader(search_paths=SOURCES)
    for package in PACKAGES:
        loader.load(package)
    loader.resolve_aliases()
    pages = {f"{page.name}.md": "\n".join(_page(page, loader.modules_collection)) for page in PAGES}
    pages[f"{failure_page.NAME}.md"] = failure_page.render()
    index = [f"* [{page.title}]({page.name}.md): {_names(page)}" for page in PAGES]
    index.append(f"* [{failure_page.TITLE}]({failure_page.NAME}.md): the values of `outcome.category`")
    pages["README.md"] = "\n".join(
        ["# Reference", "", "Made from the docstrings by `make reference`.", "", *index, ""]
    )
    return pages


def _names(page: Page) -> str:
    return ", ".join(f"`{path.rpartition('.')[2]}`" for path in page.objects)


def _page(page: Page, modules: griffe.ModulesCollection) -> Iterator[str]:
    yield "<!-- Made by `make reference` from the docstrings; change those. -->"
    yield f"# {page.title}\n\n{page.intro}\n"
    for path in page.objects:
        yield from _object(_final(modules[path]), path.rpartition(".")[2])


def _final(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if isinstance(found, griffe.Alias) else found


def _enum_value(member: griffe.Attribute) -> object:
    """Return the value of a member, which is the first of the arguments of ``__new__``."""
    made_of = member.value
    return next(iter(made_of.elements)) if isinstance(made_of, griffe.ExprTuple) else made_of


def _members(found: griffe.Class) -> Iterator[tuple[str, griffe.Object]]:
    for name, member in found.all_members.items():
        home = _final(member)
        if home.path.split(".")[0] in PACKAGES:
            yield name, home


def _object(found: griffe.Object, name: str) -> Iterator[str]:
    yield f"## {name}\n"
    if isinstance(found, griffe.Class):
        yield from _class(found, name)
    elif isinstance(found, griffe.Function):
        yield _block(_signature(found, name))
        yield _text(found)
    elif isinstance(found, griffe.Attribute):
        yield _block(f"{name} = {found.value}")
        yield _text(found)


def _class(found: griffe.Class, name: str) -> Iterator[str]:
    yield _block(_class_signature(found, name))
    yield _text(found)
    if _has_base(found, "TypedDict"):
        # The class that declares an entry explains it.
        for key, member in found.members.items():
            if isinstance(member, griffe.Attribute):
                yield f"* `{key}: {member.annotation}`: {' '.join(_text(member).split())}"
        yield ""
        return
    if _has_base(found, "StrEnum"):
        values = [
            f"`{key} = {_enum_value(member)}`"
            for key, member in _members(found)
            if isinstance(member, griffe.Attribute) and key.isupper() and not key.startswith("_")
        ]
        yield f"Members: {', '.join(values)}\n"
    for key, member in _members(found):
        if key.startswith("_") or member.docstring is None:
            continue
        if isinstance(member, griffe.Function):
            yield f"### {name}.{key}()\n"
            yield _block(_signature(member, key))
            yield _text(member)
        elif isinstance(member, griffe.Attribute) and "property" in member.labels:
            yield f"### {name}.{key}\n"
            yield _block(f"{key}: {member.annotation}")
            yield _text(member)


def _class_signature(found: griffe.Class, name: str) -> str:
    members = dict(_members(found))
    if _has_base(found, "Model", "CredentialsBlock"):
        fields = [
            f"{key}: {member.annotation}{_default(member)}"
            for key, member in members.items()
            if isinstance(member, griffe.Attribute) and "property" not in member.labels
            if member.annotation is not None and not key.startswith("_")
        ]
        return _wrapped(name, ["*", *fields], "")
    start = members.get("__init__")
    if isinstance(start, griffe.Function):
        return _signature(start, name).removesuffix(" -> None")
    return f"class {name}({', '.join(str(base) for base in found.bases)})"


def _default(field: griffe.Attribute) -> str:
    """Return ``= value`` of a field; for pydantic's ``Field(...)``, only its default."""
    if not isinstance(field.value, griffe.ExprCall):
        return "" if field.value is None else f" = {field.value}"
    named = {
        argument.name: argument.value
        for argument in field.value.arguments
        if isinstance(argument, griffe.ExprKeyword)
    }
    if "default_factory" in named:
        return f" = {named['default_factory']}()"
    return f" = {named['default']}" if "default" in named else ""


def _has_base(found: griffe.Class, *names: str) -> bool:
    bases = {str(base).rpartition(".")[2] for kind in [found, *found.mro()] for base in kind.bases}
    return bool(bases & set(names))


def _signature(function: griffe.Function, name: str) -> str:
    parameters: list[str] = []
    starred = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        prefix = _PREFIXES.get(parameter.kind, "")
        if parameter.kind is griffe.ParameterKind.keyword_only and not starred:
            parameters.append("*")
            starred = True
        starred = starred or prefix == "*"
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = f" = {parameter.default}" if parameter.default is not None and not prefix else ""
        parameters.append(f"{prefix}{parameter.name}{annotation}{default}")
    result = f" -> {function.returns}" if function.returns is not None else ""
    start = "async " if "async" in function.labels else ""
    return _wrapped(start + name, parameters, result)


def _wrapped(start: str, items: list[str], result: str) -> str:
    line = f"{start}({', '.join(items)}){result}"
    if len(line) <= _SIGNATURE_WIDTH:
        return line
    inner = "".join(f"    {item},\n" for item in items)
    return f"{start}(\n{inner}){result}"


def _block(code: str) -> str:
    return f"```python signature\n{code}\n```\n"


def _text(found: griffe.Object) -> str:
    text = textwrap.dedent(found.docstring.value) if found.docstring else ""
    return as_markdown(text)


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown: Google's sections become headings, lists and code blocks."""
    lines = text.split("\n")
    written: list[str] = []
    while lines:
        line = lines.pop(0)
        section = _SECTION.fullmatch(line)
        if section is None:
            written.append(line.removesuffix(":") if line.endswith("::") else line)
            continue
        body: list[str] = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        inner = textwrap.dedent("\n".join(body)).strip("\n")
        written += [*_section(section[1], inner), *([""] if lines else [])]
    return "\n".join(written).rstrip("\n") + "\n"


def _section(title: str, text: str) -> Iterator[str]:
    if title == "Example":
        yield from ("**Example**", "", *_example(text))
    elif title in _LISTS:
        yield from (f"**{title}**", "")
        yield from _entries(text)
    else:
        yield f"**{title}**: {' '.join(text.split())}"


def _example(text: str) -> Iterator[str]:
    """Yield an example: code alone, code in double backticks or a fence, or a sentence about code."""
    fenced = re.fullmatch(r"(?P<before>.*?)```python\n(?P<code>.*)\n```", text, re.DOTALL)
    code = re.fullmatch(r"``((?:(?!``).)+)``", text, re.DOTALL)
    if fenced:
        yield from (fenced["before"].rstrip("\n"), "") if fenced["before"] else ()
        yield _block(fenced["code"]).rstrip("\n")
    elif code is None and text.startswith("``"):
        yield text
    else:
        yield _block(code[1] if code else text).rstrip("\n")


def _entries(text: str) -> Iterator[str]:
    for entry in re.split(r"\n(?! )", text):
        found = _ENTRY.fullmatch(" ".join(entry.split()))
        if found is None:
            yield f"* {' '.join(entry.split())}"
        else:
            names = ", ".join(f"`{name}`" for name in found["names"].split(", "))
            yield f"* {names}: {found['text']}"


if __name__ == "__main__":
    main()
