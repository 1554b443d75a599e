"""The sentences that describe what is wrong with a caller's input.

pydantic reports one line for each member of a union, in terms of its own types. Here each field has one
sentence: its path, what is expected there, and the value it got. A value that may be a secret is not shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

_TEXT, _WHOLE, _NUMBER, _TRUTH = "a string", "a whole number", "a number", "true or false"
_LIST, _MAPPING = "a list", "a mapping"
_EXPECTED = {
    "string_type": _TEXT,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "list_type": _LIST,
    "sequence_str": _LIST,
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "missing": "a value",
}
_CLASSES = {"Sequence": _LIST, "Mapping": _MAPPING}
# A part of pydantic's path that names a member of a union and not a field: `dict[str,any]`,
# `function-wrap[...]`, and in pydantic 2.7 `constrained-str`.
_MEMBER = re.compile(r"str|int|float|bool|function-.*|constrained-.*|.*\[.*|[A-Z][A-Za-z]*")
# Fields whose values may be secrets; errors show their type instead.
_SECRET = {"env", "registry_auth", "RegistryAuth", "headers", "probes"}
# One of the values that Pydantic lists for a choice.
_CHOICE = re.compile(r"'[^']*'")
_LOGIN = re.compile(r"://[^/@\s]+@")
# Most characters of a shown value: enough to recognize it, and an error stays a few lines long.
_LONGEST = 80


class Known(NamedTuple):
    """What errors know of a class: what they call a value of it, and its fields."""

    form: str
    fields: tuple[str, ...]


def in_words(model: str, error: ValidationError, known: Mapping[str, Known]) -> str:
    """Return a sentence for each wrong field; ``known`` are the classes by name."""
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_path(item), []).append(item)
    # A union's lines about the parts of a value are more precise than those about the whole value.
    inner = [path for path in found if not any(path == other[: len(path)] != other for other in found)]
    return " ".join(dict.fromkeys(_sentence(model, path, found[path], known) for path in inner))


def _path(item: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return the path of a wrong value without the members of unions in it."""
    loc = item["loc"]
    # These are always names of fields, even if they look like types: the first, and a missing or unknown one.
    names = {0, len(loc) - 1} if item["type"] in ("missing", "extra_forbidden") else {0}
    return tuple(
        part
        for index, part in enumerate(loc)
        if index in names or isinstance(part, int) or not _MEMBER.fullmatch(part)
    )


def _sentence(model: str, path: tuple[str | int, ...], items: list[Any], known: Mapping[str, Known]) -> str:
    where, dot = model, "."
    for part in path:
        where += f", item {part + 1}" if isinstance(part, int) else f"{dot}{part}"
        dot = ", " if isinstance(part, int) else "."
    # The message of one of our own validators is already precise.
    own = [item for item in items if item["type"] == "value_error"]
    if own:
        text = own[0]["msg"].removeprefix("Value error, ").removeprefix(f"{path[0]}: " if path else "")
    elif items[0]["type"] == "extra_forbidden":
        text = f"there is no such field; {_choices(model, items[0]['loc'], known)}"
    else:
        *others, last = dict.fromkeys(_expected(item, known) for item in items)
        wanted = f"{', '.join(others)} or {last}" if others else last
        got = "none" if items[0]["type"] == "missing" else _shown(model, path, items[0]["input"])
        text = f"expected {wanted}, got {got}"
    end = "" if text.endswith("?") else "."
    return f"{where}: {text.removesuffix('.')}{end}"


def _choices(model: str, loc: Sequence[Any], known: Mapping[str, Known]) -> str:
    """Return which field may have been meant; the class is the last one in the path, else the model."""
    from difflib import get_close_matches

    owner = next((part for part in reversed(loc[:-1]) if part in known), model if len(loc) == 1 else "")
    fields = known[owner].fields if owner in known else ()
    if close := get_close_matches(str(loc[-1]), fields, 1):
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(fields)}" if fields else "check its spelling"


def _expected(item: Mapping[str, Any], known: Mapping[str, Known]) -> str:
    name = item.get("ctx", {}).get("class_name", item.get("ctx", {}).get("class"))
    if isinstance(name, str):
        return known[name].form if name in known else _CLASSES.get(name) or name
    text: str = item["msg"]
    return _EXPECTED.get(item["type"]) or _each_once(text.removeprefix("Input should be "))


def _shown(model: str, path: tuple[str | int, ...], value: Any) -> str:
    items = value if isinstance(value, list | tuple) else [value]
    is_plain = all(item is None or isinstance(item, str | int | float) for item in items)
    if path and is_plain and _SECRET.isdisjoint((model, *path)):
        text = _LOGIN.sub("://***@", repr(value))
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    kinds = {bool: "a bool", str: _TEXT, int: _NUMBER, float: _NUMBER, list: _LIST, tuple: _LIST}
    if isinstance(value, Mapping):
        return _MAPPING
    return kinds.get(type(value), "none" if value is None else f"a {type(value).__name__}")


def _each_once(text: str) -> str:
    """Return a list of choices such as ``'a', 'b', 'b' or 'c'`` with each of them once."""
    names = list(dict.fromkeys(_CHOICE.findall(text)))
    is_list = len(names) > 1 and not _CHOICE.sub("", text).replace(" or ", "").strip(", ")
    return f"{', '.join(names[:-1])} or {names[-1]}" if is_list else text
