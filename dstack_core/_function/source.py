"""The source of a function, which is how it travels with ``serializer="json"``."""

from __future__ import annotations

import ast
import builtins
import inspect
import symtable
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from dstack_core.errors import ConfigurationError

# Annotations may name what only the caller's file imports, so they stay text.
_HEAD = "from __future__ import annotations\n\n\n"
_WAY_OUT = "Write it as a def of its own, or use serializer='cloudpickle'."
# What every module has.
_MODULE_NAMES = frozenset(
    {"__name__", "__file__", "__doc__", "__spec__", "__package__", "__loader__", "__builtins__"}
)


def source_of(function: Callable[..., Any]) -> str:
    """Return the text of a module that has the function, without decorators.

    Raises ``ConfigurationError`` for a function that its source alone does not make: a lambda, a bound
    method, a closure, or one that uses names of its file.
    """
    name = getattr(function, "__name__", repr(function))
    _refuse_what_has_more(function, name)
    try:
        text = textwrap.dedent(inspect.getsource(function))
        found = next(
            node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
    except (OSError, TypeError, SyntaxError, StopIteration) as error:
        raise ConfigurationError(
            f"{name}: expected a function whose source can be read, got an error ({error}). {_WAY_OUT}"
        ) from None
    source = _HEAD + "".join(text.splitlines(keepends=True)[found.lineno - 1 :])
    missing = sorted(_missing(symtable.symtable(source, f"{name}.py", "exec"), name))
    if missing:
        raise ConfigurationError(
            f"{name}: expected a function that brings along what it uses, got one that uses "
            f"{', '.join(missing)} of its file. Import or define it inside the function, pass it as an "
            "argument, or use serializer='cloudpickle'."
        )
    return source


def _refuse_what_has_more(function: Callable[..., Any], name: str) -> None:
    if inspect.ismethod(function):
        got = "a bound method, whose object does not travel"
    elif not inspect.isfunction(function):
        got = f"{type(function).__name__}, which has no def"
    elif name == "<lambda>":
        got = "a lambda"
    elif function.__closure__ and function.__code__.co_freevars:
        names = ", ".join(function.__code__.co_freevars)
        got = f"a closure over {names}, whose values do not travel"
    else:
        return
    raise ConfigurationError(f"{name}: expected a plain function, got {got}. {_WAY_OUT}")


def _missing(table: symtable.SymbolTable, function: str) -> set[str]:
    """Return the global names that the source uses and does not define."""
    defined, used = set(_MODULE_NAMES | set(vars(builtins))), set[str]()
    for each in _tables(table):
        is_top = each.get_type() == "module"
        for symbol in each.get_symbols():
            is_bound = symbol.is_assigned() or symbol.is_imported()
            if is_bound and (is_top or symbol.is_declared_global()):
                defined.add(symbol.get_name())
            elif symbol.is_referenced() and (is_top or symbol.is_global()):
                used.add(symbol.get_name())
    return used - defined - {function}


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        # Annotations stay text, so what they name is not needed; from Python 3.14 on they have a table of
        # their own.
        if "annotation" not in str(child.get_type()).lower():
            yield from _tables(child)
