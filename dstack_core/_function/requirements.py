"""The packages that a run installs before its function starts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from dstack_core.errors import ConfigurationError

RequirementsLike: TypeAlias = Sequence[str] | str | os.PathLike[str]
"""A list of requirements as pip has them, or the path of a requirements file."""

# Formats that pip and uv do not install from, with what they are exported by.
_OTHER_FORMATS = {
    "uv.lock": "uv export -o requirements.txt",
    "poetry.lock": "poetry export -o requirements.txt",
    "pdm.lock": "pdm export -o requirements.txt",
}
# Options with a file of this machine, which the run does not have.
_FILE_OPTION = re.compile(r"(-r|-c|-e|--requirement|--constraint|--editable)\b")
WHEELS = "wheels"


@dataclass(frozen=True, slots=True)
class Requirements:
    """The text of a requirements file, and the wheels of this machine that it names by their file names."""

    text: str = ""
    wheels: dict[str, Path] = field(default_factory=dict)


def read_requirements(given: RequirementsLike) -> Requirements:
    """Return what the run installs. Raises ``ConfigurationError`` for what it could not install from."""
    if isinstance(given, str | os.PathLike):
        lines, folder = _lines_of(Path(given).expanduser()), Path(given).expanduser().parent
    elif isinstance(given, Sequence) and all(isinstance(item, str | os.PathLike) for item in given):
        lines, folder = [os.fspath(item) for item in given], Path()
    else:
        raise ConfigurationError(
            'requirements: expected a list such as ["torch==2.9"], or the path of a requirements file, got '
            f"{given!r}."
        )
    wheels: dict[str, Path] = {}
    return Requirements("".join(f"{_line(line, folder, wheels)}\n" for line in lines), wheels)


def _lines_of(path: Path) -> list[str]:
    if path.name in _OTHER_FORMATS:
        raise ConfigurationError(
            f"requirements: expected a file that pip can read, got {str(path)!r}. Write one with "
            f"`{_OTHER_FORMATS[path.name]}`."
        )
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ConfigurationError(
            f"requirements: expected the path of a requirements file, got {str(path)!r} ({reason}). Write "
            "single requirements as a list."
        ) from None


def _line(line: str, folder: Path, wheels: dict[str, Path]) -> str:
    """Return a line as the run has it: a wheel of this machine gets its path there."""
    text = line.strip()
    if _FILE_OPTION.match(text):
        raise ConfigurationError(
            f"requirements: expected lines without files of this machine, got {text!r}. Write what that file "
            "has into the list, or compile both with `uv pip compile`."
        )
    if not text.endswith(".whl") or "://" in text:
        return line
    path = (folder / text).expanduser()
    if not path.is_file():
        raise ConfigurationError(f"requirements: expected a wheel, got {text!r}, and there is no such file.")
    if wheels.setdefault(path.name, path) != path:
        raise ConfigurationError(f"requirements: expected one wheel named {path.name!r}, got two.")
    # The comment makes a rebuilt wheel of the same name another requirement.
    return f"./{WHEELS}/{path.name}  # {sha256(path.read_bytes()).hexdigest()}"
