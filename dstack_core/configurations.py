"""Read run configurations: a ``.dstack.yml`` file or a dict is as good as a ``Task``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, Service, Task

ConfigurationLike: TypeAlias = Configuration | Mapping[str, Any] | str | os.PathLike[str]
"""A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml`` file."""

# What no file is called: a text of several lines, or one with a key.
_YAML = re.compile(r".*\n|\s*[\w-]+:(\s|$)", re.ASCII)

_TYPES: dict[str, type[Configuration]] = {"task": Task, "service": Service, "dev-environment": Configuration}


def load_configuration(source: ConfigurationLike) -> Configuration:
    """Return the configuration that ``source`` is, or names as a path.

    Relative paths in ``files`` are those of the folder the file lies in; of a dict or a ``Task`` they are
    those of the current directory. Raises ``ConfigurationError`` when the file cannot be read, is no
    mapping, or is wrong.
    """
    if isinstance(source, Configuration):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, "configuration")
    if isinstance(source, str | os.PathLike) and os.fspath(source):
        path = Path(source).expanduser()
        return _from_mapping(_read(path), str(path), path.absolute().parent)
    raise ConfigurationError(
        "configuration: expected a Task, a Service, a dict or the path of a .dstack.yml, got "
        f"{repr(source) if isinstance(source, str | int | float | None) else type(source).__name__}."
    )


def parse_configuration(text: str, name: str = "configuration") -> Configuration:
    """Return the configuration written as YAML in ``text``; ``name`` is used in errors.

    Raises ``ConfigurationError``.
    """
    return _from_mapping(_parse(text, name), name)


def _read(path: Path) -> Any:
    if _YAML.match(str(path)) and not path.exists():
        raise ConfigurationError(
            "configuration: expected the path of a .dstack.yml or a dict, got YAML text. "
            "Pass dstack_core.parse_configuration(text)."
        )
    try:
        return _parse(path.read_text(), str(path))
    except IsADirectoryError:
        raise ConfigurationError(f"configuration: expected a file, got the directory {path}.") from None
    except OSError as error:
        raise ConfigurationError(f"configuration: {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"configuration: {path}: expected a text file, got a binary one.") from None


def _parse(text: str, name: str) -> Any:
    # Only those who read a file wait for the import.
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "expected YAML, got something else"
        if problem == "but found another document":
            problem = "expected one document, got another one here."
        raise ConfigurationError(f"{_subject(name)}{line}: {problem}") from None


def _from_mapping(data: Any, name: str, folder: Path | None = None) -> Configuration:
    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{_subject(name)}: expected a mapping such as `type: task`, got a {type(data).__name__}."
        )
    kind = data.get("type")
    model = _TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        known = ", ".join(f"`type: {each}`" for each in _TYPES)
        got = "none" if kind is None else f"{kind!r}"
        raise ConfigurationError(f"{_subject(name)}: expected one of {known}, got {got}.")
    return model.model_validate(data, context={"folder": folder})


def _subject(name: str) -> str:
    """Return what begins an error: the parameter, and the file where there is one."""
    return name if name == "configuration" else f"configuration: {name}"
