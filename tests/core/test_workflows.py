"""The workflows for a public forge run what ``.ci/run`` runs, and name no registry and no secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# What prepares or sums up the suites that one machine runs beside each other; a forge has a machine for each.
NOT_TESTS = {"environments", "count-tests"}
MAKE = re.compile(r"^(?P<variables>(?:[A-Z_]+=\S+ )*)make (?P<target>[a-z-]+)(?P<rest>.*)$", re.MULTILINE)


def jobs_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def commands_of(job: dict[str, Any]) -> list[str]:
    """Return the commands of a job, once for each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    commands = [step["run"] for step in job["steps"] if "run" in step]
    for name, values in matrix.items():
        place = f"${{{{ matrix.{name} }}}}"
        commands = [command.replace(place, value) for command in commands for value in values]
    return commands


def parts_of(target: str) -> set[str]:
    """Return what a target of the Makefile depends on among the targets, itself if nothing."""
    text = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^{target}:(?P<needs>[^#\n]*)", text, re.MULTILINE)
    assert rule is not None, target
    return {word for word in rule["needs"].split() if re.fullmatch(r"test-[a-z-]+", word)} or {target}


def test_every_command_of_ci_run_is_in_the_workflow() -> None:
    jobs = jobs_of(ROOT / ".github" / "workflows" / "ci.yml")
    ran = {
        found["target"]: (found["rest"].strip(), job)
        for job in jobs.values()
        for command in commands_of(job)
        for found in MAKE.finditer(command)
    }
    # One Python of the machine after the other; a forge has a job for each.
    ran["test-pythons"] = ran["test-python"]
    lines = list(MAKE.finditer((ROOT / ".ci" / "run").read_text()))
    assert len(lines) >= 4
    for line in lines:
        for target in parts_of(line["target"]) - NOT_TESTS:
            assert target in ran, f".ci/run runs make {target}, ci.yml does not"
            rest, job = ran[target]
            for word in re.findall(r"MATRIX=\"[^\"]*\"", line["rest"]):
                assert word in rest
            for pair in line["variables"].split():
                name, _, value = pair.partition("=")
                assert job.get("env", {}).get(name) == value, f"{target}: {pair}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_no_registry_and_its_targets_exist(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://|secrets\.|index-url|password", text)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, job in jobs_of(path).items():
        assert job["timeout-minutes"] <= 90, name
        for command in commands_of(job):
            for found in MAKE.finditer(command):
                assert found["target"] in [*targets, "test"], command


def test_only_the_job_that_publishes_may_ask_for_an_identity() -> None:
    jobs = jobs_of(ROOT / ".github" / "workflows" / "release.yml")
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["environment"] == "release"
    assert all("permissions" not in job for name, job in jobs.items() if name != "publish")
    assert not commands_of(jobs["publish"])
