"""What a distribution imports and what it declares, read from its sources and its pyproject.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# The folder of each distribution's pyproject.toml, and its packages.
PACKAGES = {
    ".": ("dstack_core", "dstack_report"),
    "providers/airflow": ("src/airflow_provider_dstack",),
    "providers/prefect": ("src/prefect_dstack",),
}
# The modules of a distribution, where they are not called as it is.
_MODULES = {
    "apache-airflow": ("airflow",),
    "attrs": ("attr", "attrs"),
    "dstack-core": ("dstack_core", "dstack_report"),
    "pyyaml": ("yaml",),
}


def modules_of(requirement: str) -> tuple[str, ...]:
    """Return the top-level modules of what a requirement names."""
    name = canonicalize_name(Requirement(requirement).name)
    return _MODULES.get(name, (name.replace("-", "_"),))


def project_of(folder: str) -> dict[str, Any]:
    """Return the metadata that a distribution's pyproject.toml declares."""
    found: dict[str, Any] = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    return found


@cache
def imports_of(folder: str) -> dict[str, set[Path]]:
    """Return the top-level modules of others that a distribution imports, each with the files that do."""
    found: dict[str, set[Path]] = {}
    own = {Path(package).name for package in PACKAGES[folder]}
    for package in PACKAGES[folder]:
        for path in (ROOT / folder / package).rglob("*.py"):
            for name in _imported(ast.parse(path.read_text())):
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in own:
                    found.setdefault(top, set()).add(path.relative_to(ROOT))
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def always_brought(distribution: str) -> set[str]:
    """Return the modules of what an installed distribution needs without an extra, and of its own parts."""
    found: set[str] = set()
    for text in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found |= set(modules_of(text))
        if (
            re.fullmatch(r"apache-airflow-(core|task-sdk)", requirement.name)
            and distribution == "apache-airflow"
        ):
            found |= always_brought(requirement.name)
    return found
