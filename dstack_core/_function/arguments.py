"""The arguments of a call: checked, and in the form in which they travel."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dstack_core._function import main
from dstack_core.errors import ConfigurationError


def without_partial(
    function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return the function behind ``functools.partial``, with the arguments of both."""
    while isinstance(function, functools.partial):
        args, kwargs = [*function.args, *args], {**function.keywords, **kwargs}
        function = function.func
    if not callable(function):
        raise ConfigurationError(f"function: expected a function, got {function!r}.")
    return function, args, kwargs


def check_arguments(function: Callable[..., Any], name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Raise ``ConfigurationError`` for arguments that the function does not take."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some functions that are written in C have none.
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        reason = str(error).removeprefix("got ")
        raise ConfigurationError(
            f"{name}: expected arguments for {name}{signature}, got others: {reason}. Options of the run are "
            "listed in the reference of client.functions."
        ) from None


def plain_arguments(name: str, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as ``call.json`` has them.

    Raises ``ConfigurationError`` for what JSON would lose.
    """
    try:
        plain_args, plain_kwargs = [_plain(value) for value in args], _plain(kwargs)
        json.dumps([plain_args, plain_kwargs], default=str)
    except (RecursionError, ValueError) as error:
        raise ConfigurationError(
            f"{name}: expected arguments that JSON can carry, got one that it cannot ({error}). Pass plain "
            "values, or use serializer='cloudpickle'."
        ) from None
    places = [(f"argument {number}", value) for number, value in enumerate(plain_args, 1)]
    places += [(f"argument {key!r}", value) for key, value in plain_kwargs.items()]
    for place, value in places:
        problem = main.not_json(value, place)
        if problem:
            message = f"{name}: {problem}. Pass plain values, or use serializer='cloudpickle'."
            raise ConfigurationError(message)
    return {"args": plain_args, "kwargs": plain_kwargs}


def _plain(value: Any) -> Any:
    """Return lists and dicts for what is like one: engines pass lazy sequences."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item) for item in value]
    return value


def pickled(
    function: Callable[..., Any],
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    cloudpickle: Any,
    delivered: frozenset[str],
) -> dict[str, Any]:
    """Return the pickle of a call and the version of cloudpickle.

    The module of the function is pickled by value, unless it is one of those ``delivered``. Raises
    ``ConfigurationError`` for what cannot be pickled.
    """
    # The run cannot import the file of the function, unless it was delivered.
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is not None and (
        module.__name__.partition(".")[0] in {*delivered, "builtins"}
        or module.__name__ in cloudpickle.list_registry_pickle_by_value()
    ):
        module = None
    try:
        if module is not None:
            cloudpickle.register_pickle_by_value(module)
        data = cloudpickle.dumps((function, args, kwargs))
    except Exception as error:
        raise ConfigurationError(
            f"{name}: expected a function and arguments that can be pickled, got {error!r}."
        ) from error
    finally:
        if module is not None:
            cloudpickle.unregister_pickle_by_value(module)
    version = ".".join(str(cloudpickle.__version__).split(".")[:2])
    return {"pickle": base64.b64encode(data).decode(), "cloudpickle": version}
