"""Every code block of the documentation runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.docs.blocks import PAGES, ROOT, Block, blocks, check_outputs, every_block

# The test that runs the blocks of each kind; "" is a drawing.
JUDGES = {
    "": "nothing to run",
    "python": "here",
    "shell": "here",
    "python airflow": "tests/provider_airflow/test_airflow_docs.py",
    "shell airflow": "tests/provider_airflow/test_airflow_docs.py",
    "python prefect": "tests/provider_prefect/test_prefect_docs.py",
    "yaml prefect": "tests/provider_prefect/test_prefect_yaml.py",
    "python prefect runners": "tests/provider_prefect/test_runner_docs.py",
    "python airflow test": "tests/provider_airflow/test_user_tests.py",
    "python prefect test": "tests/provider_prefect/test_user_tests.py",
    "python airflow installed": "tests/installed/test_installed.py",
    "shell installed": "tests/installed/test_installed.py",
    "python attach": "tests/contract/test_usage_example.py",
    "shell dstack": "tests/contract/test_official_client.py",
    "shell prefect": "tests/provider_prefect/test_prefect_docs.py",
    "python signature": "tests/docs/test_reference.py",
    "dockerfile": "tests/provider_airflow/test_executor_docs.py",
    "dockerfile prefect": "tests/provider_prefect/test_image_docs.py",
    "text requirements": "tests/provider_prefect/test_image_docs.py",
    "ini": "tests/provider_airflow/test_executor_docs.py",
    "yaml": "tests/provider_airflow/test_executor_docs.py",
    "shell tutorial": "tests/docs/tutorial.py",
    "output": "those of the block that prints it",
}
PRINTING = {
    "python",
    "python airflow",
    "python prefect",
    "python prefect runners",
    "shell tutorial",
    "shell installed",
}


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


def test_every_kind_of_block_has_a_test_that_runs_it() -> None:
    for block in every_block():
        assert block.info in JUDGES, f"{block}: who runs {block.info!r}?"
        assert not block.outputs or block.info in PRINTING, f"{block}: no test checks its output"
    for judge in JUDGES.values():
        if judge.startswith("tests/"):
            assert (ROOT / judge).is_file(), judge


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_run_as_printed(block: Block, server: LocalServer, tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "DSTACK_SERVER_URL": server.url,
        "DSTACK_PROJECT": server.project,
        "DSTACK_TOKEN": server.token,
    }
    # A function that runs elsewhere is read from its file.
    script = tmp_path / "block.py"
    script.write_text(block.code)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    check_outputs(block, done.stdout)


@pytest.mark.parametrize("block", blocks("shell"), ids=str)
def test_shell_blocks_name_commands_that_exist(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {
        "demo",
        "test",
    }
    distributions = {"dstack-core", "airflow-provider-dstack", "prefect-dstack"}
    for line in block.code.splitlines():
        words = line.partition("#")[0].replace('"', "").split()
        if not words:
            continue
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[:2] == ["pip", "install"]:
            assert {word.partition("[")[0] for word in words[2:] if "dstack" in word} <= distributions, line
            assert any("dstack" in word for word in words[2:]), line
        elif words[:2] == ["python", "-m"]:
            # The options of a command are in its own help.
            command = words[3:4] if words[2] == "dstack_core" else []
            done = subprocess.run(
                [sys.executable, "-m", words[2], *command, "--help"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            for flag in [word for word in words[3:] if word.startswith("--")]:
                assert flag in done.stdout, line
        else:
            assert words[:2] in (["git", "clone"], ["prefect", "block"]), f"{block}: nobody runs {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_have_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"
