"""The runner of ``.ci/run``: what fails beside others and passes alone is reported, all else stays a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import count_tests, pytest_twice

ONCE = """
from pathlib import Path

def test_fails_the_first_time():
    seen = Path(__file__).with_suffix(".seen")
    first = not seen.exists()
    seen.touch()
    assert not first

def test_passes():
    calls = Path(__file__).with_suffix(".calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
"""
ALWAYS = "def test_fails():\n    assert False\n"
MANY = "import pytest\n\n@pytest.mark.parametrize('x', range(6))\ndef test_fails(x):\n    assert False\n"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "reports" / "failed-once.txt"
    monkeypatch.setattr(pytest_twice, "REPORT", path)
    return path


def run(folder: Path, text: str) -> int:
    (folder / "test_sample.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    # One worker, which still is beside others for xdist: each loads pytest anew, and its plugins.
    unused = [f"-p no:{name}" for name in ("hypothesispytest", "anyio", "timeout")]
    arguments = ["-q", *unused, "-n", "1", "--dist", "loadfile", f"--junitxml={folder / 'all.xml'}"]
    return pytest_twice.run([*arguments, "-c", str(folder / "pytest.ini"), str(folder / "test_sample.py")])


def test_a_test_that_passes_alone_is_reported_and_counts_as_passed(
    tmp_path: Path, report: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, ONCE) == 0
    assert [line.rpartition("::")[2] for line in report.read_text().split()] == ["test_fails_the_first_time"]
    assert (tmp_path / "test_sample.calls").read_text() == "x"
    assert count_tests.main([str(tmp_path / "all.xml")]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("text", [ALWAYS, MANY], ids=["fails again", "too many failures"])
def test_a_failure_stays_a_failure(tmp_path: Path, report: Path, text: str) -> None:
    assert run(tmp_path, text) == 1
    assert not report.exists()
    assert count_tests.main([str(tmp_path / "all.xml")]) == 1


def test_without_a_failure_nothing_is_reported(tmp_path: Path, report: Path) -> None:
    assert run(tmp_path, "def test_passes():\n    pass\n") == 0
    assert not report.exists()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, report: Path) -> None:
    assert run(tmp_path, "import nowhere\n") not in (0, 5)
    assert not report.exists()
