"""The modules of a project that travel with a function.

Each lies in one folder that is on the run's ``sys.path``, a package under its own name. What the ignore files
name stays out, as with all code that is uploaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from dstack_core._code.ignored import walk
from dstack_core.errors import ConfigurationError

ModuleLike: TypeAlias = ModuleType | str | os.PathLike[str]
"""An imported module or package, or the path of a file or folder."""

_IGNORE_FILES = (".gitignore", ".dstackignore")


def find_modules(modules: Iterable[ModuleLike] | ModuleLike) -> dict[str, Path]:
    """Return the files of the modules by their paths in the run's folder of modules.

    A module of a package takes along the whole package of the top level, since importing it imports that
    first. Raises ``ConfigurationError`` for what is not there, has no file, or comes twice.
    """
    single = isinstance(modules, str | os.PathLike | ModuleType)
    given: Any = [modules] if single else modules
    found: dict[str, Path] = {}
    roots: dict[str, Path] = {}
    for module in given:
        for root in dict.fromkeys(_roots(module)):
            other = roots.setdefault(root.name, root)
            if other != root:
                raise ConfigurationError(
                    f"modules: expected names that differ, got {str(other)!r} and {str(root)!r}. "
                    "Leave one out."
                )
            try:
                found.update(_files(root))
            except OSError as error:
                raise ConfigurationError(f"modules: {error.filename or root}: {error.strerror}.") from None
    return found


def names_of(files: Iterable[str]) -> frozenset[str]:
    """Return the names of the modules of the top level among these files."""
    return frozenset(name.partition("/")[0].removesuffix(".py") for name in files)


def _roots(module: ModuleLike) -> list[Path]:
    """Return the files and folders of a module."""
    if isinstance(module, ModuleType):
        return _roots_of(module)
    if not isinstance(module, str | os.PathLike):
        raise ConfigurationError(
            "modules: expected a module, a package or the path of a file or folder, got "
            f"{type(module).__name__}. Pass a list of them."
        )
    path = Path(os.path.abspath(Path(module).expanduser()))  # noqa: PTH100 - links keep their names
    if not path.exists() or not path.name:
        raise ConfigurationError(
            f"modules: expected the path of a file or folder, got {os.fspath(module)!r}, and there is none "
            f"at {path}. Relative paths begin at the current directory."
        )
    return [path]


def _roots_of(module: ModuleType) -> list[Path]:
    import sys

    name = module.__name__.partition(".")[0]
    top = sys.modules.get(name, module)
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    if folders:
        return folders
    file = getattr(top, "__file__", None)
    if name == "__main__" or not file or not file.endswith(".py"):
        got = "the program itself" if name == "__main__" else f"{module.__name__!r}, which has none"
        raise ConfigurationError(
            f"modules: expected a module with a file of Python, got {got}. Pass the path of what the "
            "function imports."
        )
    return [Path(file)]


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    if not root.is_dir():
        yield root.name, root
        return
    empty = True
    for path in walk(root):
        if "__pycache__" in path.parts or path.name in _IGNORE_FILES:
            continue
        if path.is_dir():
            raise ConfigurationError(
                f"modules: expected files, got {str(path)!r}, a link to a folder. Name it in .dstackignore, "
                "or pass the folder itself."
            )
        # A link whose target is gone has no content that could travel.
        if path.exists():
            empty = False
            yield f"{root.name}/{path.relative_to(root).as_posix()}", path
    if empty:
        raise ConfigurationError(
            f"modules: expected a folder with at least one file, got {str(root)!r}, in which the ignore "
            "files leave none."
        )
