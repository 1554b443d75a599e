"""The script that counts the code that a call runs through, on a small sample and on a submit."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from scripts import walks

ROOT = Path(__file__).parent.parent.parent
SAMPLE = '''"""A docstring,
# of two lines."""

# A comment.
LIMIT = 1  # no comment line


class Box:
    """One."""

    def get(self) -> int:
        """Two."""
        # Why.
        return sum(x for x in [LIMIT])


def unused() -> None:
    ...


def outer() -> int:
    def inner() -> int:
        return Box().get()
    return inner()
'''


def test_lines_are_counted_without_docstrings() -> None:
    assert walks.count_lines(SAMPLE) == (10, 2)
    assert walks.count_lines("") == (0, 0)


def test_called_functions_are_counted_in_every_thread(tmp_path: Path) -> None:
    folder, other = tmp_path / "seen", tmp_path / "seen" / "server"
    other.mkdir(parents=True)
    for one in (folder, other):
        (one / "sample.py").write_text(SAMPLE)
    sample, server = walks.load(folder / "sample.py"), walks.load(other / "sample.py")
    with walks.watched("sample", [folder], without=[other]) as walk:
        thread = threading.Thread(target=sample.outer)
        thread.start()
        thread.join()
        server.outer()
        walks.load(folder / "sample.py")
    sample.unused()
    assert walk.files == [str(folder / "sample.py")]
    assert {name for _, name in walk.seen} == {"outer", "outer.<locals>.inner", "Box.get"}


def test_a_package_is_measured(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "sample.py").write_text(SAMPLE)
    (tmp_path / "short.py").write_text("# Nothing.\n")
    size = walks.size_of("sample", tmp_path)
    assert (size.files, size.code, size.comments, size.per_100) == (2, 10, 3, 30.0)
    assert size.longest == [("deep/sample.py", 24), ("short.py", 1)]


def test_the_script_measures_a_submit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.walks", "--walk", "submit", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    submit = found["walks"]["submit"]
    assert "dstack_core/_flow/submit.py:submit" in submit["functions"]
    assert "dstack_core/_flow/submit.py" in submit["files"]
    assert not [file for file in submit["files"] if file.startswith("dstack_core/local/")]
    assert [one["package"] for one in found["packages"]] == [*walks.PACKAGES, "total"]
