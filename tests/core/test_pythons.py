"""The Pythons that are supported: stated once, in the classifiers, and written nowhere else."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("providers/*/pyproject.toml"))]
# The name of a Python of one version, in the forms of sentences, commands, tools and settings.
_ONE_PYTHON = re.compile(
    r"(?:Python |python|python_version\W+)3\.(?P<dotted>\d+)|\b(?:py|cp)3(?P<joined>\d\d)\b"
)
# Where such a name is meant: what was measured or is promised, the image of a run, what is installed.
_MEANT = {
    "docs/": "pages say what was measured with which Python; the next tests check what they promise",
    "README.md": "it says what is needed; the next tests check it",
    "dstack_core/README.md": "as README.md",
    "providers/airflow/README.md": "as README.md",
    "providers/prefect/README.md": "as README.md",
    "CHANGELOG.md": "it says what changed",
    "CONTRIBUTING.md": "it shows how to choose another Python",
    "Makefile": "its comments show how to choose another Python",
    "constraints/": "pins",
    "tests/data/": "recorded replies",
}
# The same for single lines: a run's image, which has nothing to do with this Python, and what a module needs.
_MEANT_LINES = [
    re.compile(r"prefecthq/prefect:[\d.]+-python"),
    re.compile(r"Only Python 3\.11\.4 or newer unpacks archives safely"),
    re.compile(r"(?:[Ff]rom|[Bb]efore) Python 3\.\d+"),
]


def project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())["project"]  # type: ignore[no-any-return]


def supported(path: Path = PROJECTS[0]) -> list[str]:
    """Return the versions of the classifiers, lowest first."""
    names = (
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one)
        for one in project(path)["classifiers"]
    )
    return [name.group(1) for name in names if name]


SUPPORTED = supported()


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_the_three_packages_support_the_same_pythons(path: Path) -> None:
    assert supported(path) == SUPPORTED
    assert project(path)["requires-python"] == f">={SUPPORTED[0]}"


def _names_one(line: str) -> bool:
    found = _ONE_PYTHON.search(line)
    version = f"3.{found['dotted'] or found['joined']}" if found else ""
    return version in SUPPORTED and not any(meant.search(line) for meant in _MEANT_LINES)


@pytest.mark.parametrize(
    "line", ["for Python 3.11", "command -v python3.13", 'target = "py311"', 'python_version = "3.12"']
)
def test_a_fixed_python_is_seen(line: str) -> None:
    assert _names_one(line)


def test_no_python_is_fixed_anywhere_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("this is not a checkout of Git")
    fixed = []
    for name in listed:
        path = ROOT / name
        if name.startswith(tuple(_MEANT)) or path == Path(__file__) or not path.is_file():
            continue
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        fixed += [
            f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if _names_one(line)
        ]
    assert not fixed, "\n".join(
        ["A Python version is fixed; take it from the classifiers or from sys:", *fixed]
    )


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/versions.md",
        "docs/tutorials/airflow.md",
        "docs/tutorials/prefect.md",
        "docs/python.md",
    ],
)
def test_a_page_that_states_the_needed_python_states_the_lowest(name: str) -> None:
    stated = re.findall(r"Python (3\.\d+) or newer", (ROOT / name).read_text())
    assert stated
    assert set(stated) == {SUPPORTED[0]}


def test_the_script_finds_supported_pythons_lowest_first() -> None:
    found = subprocess.run(
        [ROOT / "scripts/pythons"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    versions = [
        subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for path in found
    ]  # fmt: skip
    assert versions == [version for version in SUPPORTED if version in versions]
    first = subprocess.run([ROOT / "scripts/pythons", "1"], capture_output=True, text=True, check=True).stdout
    assert first.splitlines() == found[:1]


def test_a_python_that_cannot_start_is_not_found(tmp_path: Path) -> None:
    for version in SUPPORTED:
        shim = tmp_path / f"python{version}"
        shim.write_text("#!/bin/sh\necho 'not selected' >&2\nexit 127\n")
        shim.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYENV_ROOT": str(tmp_path), "HOME": str(tmp_path)}
    found = subprocess.run(
        [ROOT / "scripts/pythons"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert str(tmp_path) not in found


def test_the_lowest_versions_that_are_allowed_are_those_that_are_tested() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints/lowest.txt").read_text().splitlines()
        if "==" in line
    )
    core = project(PROJECTS[0])
    chosen = ("attach", "async", "cloudpickle", "local")
    extras = [one for extra in chosen for one in core["optional-dependencies"][extra]]
    extras = [one for one in extras if not one.startswith("dstack-core")]
    for text in [*core["dependencies"], *extras]:
        one = Requirement(text)
        (lowest,) = (each.version for each in one.specifier if each.operator == ">=")
        found = Version(pinned[one.name.lower()])
        # What the others bring today needs a newer one of this.
        assert found > Version(lowest) if one.name == "typing-extensions" else found == Version(lowest), text
