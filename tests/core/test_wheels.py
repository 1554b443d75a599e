"""The wheels: each holds every file of its packages, and a run can be prepared to report from them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# The folder of each distribution, the folder of its sources, and its packages.
WHEELS = [
    (".", ".", ("dstack_core", "dstack_report")),
    ("providers/airflow", "providers/airflow/src", ("airflow_provider_dstack",)),
    ("providers/prefect", "providers/prefect/src", ("prefect_dstack",)),
]


def build(distribution: str, target: Path) -> Path:
    """Build the wheel of a distribution and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT / distribution, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.mark.parametrize(("distribution", "sources", "packages"), WHEELS, ids=lambda value: str(value))
def test_a_wheel_holds_the_files_of_its_packages(
    distribution: str, sources: str, packages: tuple[str, ...], tmp_path: Path
) -> None:
    with zipfile.ZipFile(build(distribution, tmp_path)) as wheel:
        built = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folder = ROOT / sources
    files = {
        str(path.relative_to(folder))
        for package in packages
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert built == files


def test_a_run_reports_from_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(".", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "installed")
    script = (
        "import dstack_core, dstack_report\n"
        "from dstack_core._report.delivery import module_upload\n"
        "print(dstack_core.__file__, len(module_upload().data) > 1000, dstack_report.is_active())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "installed/dstack_core/__init__.py"), "True", "False"]
