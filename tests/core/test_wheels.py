"""The distributions: what the wheels and sdists hold, and that two builds of them are equal byte for byte."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from trove_classifiers import classifiers

from scripts import project_home
from scripts.distributions import FOLDERS, build, main

ROOT = Path(__file__).parent.parent.parent
# The folder of each distribution's sources, and its packages.
SOURCES = {
    ".": (".", ("dstack_core", "dstack_report")),
    "providers/airflow": ("providers/airflow/src", ("airflow_provider_dstack",)),
    "providers/prefect": ("providers/prefect/src", ("prefect_dstack",)),
}
EACH = pytest.mark.parametrize("distribution", FOLDERS)
# What the examples' folder is in a wheel: a link, so that there is one copy of them.
EXAMPLES = {"airflow_provider_dstack/example_dags": "dags", "prefect_dstack/example_flows": "flows"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The wheel and the sdist of each distribution."""
    found = {}
    for folder in FOLDERS:
        wheel, sdist = sorted(
            build(ROOT / folder, tmp_path_factory.mktemp("dist")), key=lambda file: file.suffix
        )[::-1]
        found[folder] = (wheel, sdist)
    return found


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


@EACH
def test_a_wheel_holds_the_files_of_its_packages(
    distribution: str, built: dict[str, tuple[Path, Path]]
) -> None:
    with zipfile.ZipFile(built[distribution][0]) as wheel:
        there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources, packages = SOURCES[distribution]
    files = {
        str(path.relative_to(ROOT / sources))
        for package in packages
        for path in (ROOT / sources / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "example_" not in path.parent.name
    }
    examples = {
        f"{place}/{path.name}"
        for place, folder in EXAMPLES.items()
        if place.partition("/")[0] in packages
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".yml")
    }
    assert len(examples) > 5 or distribution == "."
    assert there == (files | examples) - {"dstack_core/README.md"}


@EACH
def test_an_sdist_holds_license_readme_and_changes_and_makes_the_same_wheel(
    distribution: str, built: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    wheel, sdist = built[distribution]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    readme = tomllib.loads((unpacked / "pyproject.toml").read_text())["project"]["readme"]
    assert (unpacked / readme).read_bytes() == (ROOT / distribution / readme).read_bytes()
    assert (unpacked / "CHANGELOG.md").read_bytes() == (ROOT / "CHANGELOG.md").read_bytes()
    assert (unpacked / "LICENSE").is_file()
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]
    (again,) = build(unpacked, tmp_path / "again", kinds=("wheel",))
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


@EACH
def test_another_build_is_equal_byte_for_byte(
    distribution: str, built: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        again = build(ROOT / distribution, tmp_path)
    finally:
        os.umask(before)
    assert {file.name: file.read_bytes() for file in again} == {
        file.name: file.read_bytes() for file in built[distribution]
    }


@EACH
def test_the_metadata_is_what_an_index_shows(distribution: str, built: dict[str, tuple[Path, Path]]) -> None:
    metadata = metadata_of(built[distribution][0])
    assert set(metadata.get_all("Classifier", [])) <= classifiers
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert all(url.startswith(project_home.home()) for url in urls.values())
    readme = str(metadata.get_payload())
    assert f"pip install {metadata['Name']}" in readme.replace('"', "")
    links = re.findall(r"\]\(([^)]+)\)", readme) + list(urls.values())
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [link.partition("/blob/main/")[2] for link in links if "/blob/main/" in link]
    assert len(ours) > 5
    assert [path for path in ours if not (ROOT / path).is_file()] == []
    # The address of the project is in no other form in it.
    assert {link.partition("/blob/")[0] for link in links if "/blob/" in link} == {project_home.home()}


def test_only_what_attaches_or_is_asked_for_needs_the_packages_of_ssh(
    built: dict[str, tuple[Path, Path]],
) -> None:
    ssh = {"paramiko", "cryptography", "websockets", "psutil"}
    for distribution in FOLDERS:
        metadata = metadata_of(built[distribution][0])
        needs = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
        always = {need.name for need in needs if need.marker is None}
        assert not always & ssh
        # None of them asks for the extra of another one.
        assert not any({"attach", "local"} & need.extras for need in needs if need.marker is None)


def test_the_address_of_the_project_is_set_in_all_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in project_home.FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    monkeypatch.setattr(project_home, "ROOT", tmp_path)
    before = project_home.home()
    project_home.set_home("https://forge.example.org/owner/name/")
    assert project_home.home() == "https://forge.example.org/owner/name"
    for file in project_home.FILES:
        text = (tmp_path / file).read_text()
        assert before not in text
        assert "https://forge.example.org/owner/name" in text
    with pytest.raises(ValueError, match=r"expected https://HOST/OWNER/NAME, got 'owner'"):
        project_home.set_home("owner")


def test_a_release_needs_an_address_and_a_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distributions", "--release"])
    monkeypatch.setattr("scripts.distributions.home", lambda: project_home.PLACEHOLDER)
    assert main() == 1
    assert "CONTRIBUTING.md" in capsys.readouterr().err


def test_a_run_reports_from_a_wheel(built: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with zipfile.ZipFile(built["."][0]) as wheel:
        wheel.extractall(tmp_path / "installed")  # noqa: S202 - it was built here
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
