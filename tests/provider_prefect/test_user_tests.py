"""How to test your flow: its files as a project of a user, with pytest run on them."""

from __future__ import annotations

from pathlib import Path

from tests.docs.blocks import ROOT
from tests.user_project import files_of, run_tests, summary, write

PAGE = ROOT / "docs" / "how-to" / "test-your-flow.md"


def test_the_page_is_a_project_whose_tests_pass(tmp_path: Path) -> None:
    write(tmp_path, files_of(PAGE, "python prefect test"))
    # The harness starts a server of its own.
    done = run_tests(tmp_path, PREFECT_API_URL="", PREFECT_HOME=str(tmp_path / ".prefect"))
    assert summary(done).startswith("5 passed"), done.stdout + done.stderr
