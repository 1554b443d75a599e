"""Build the wheels and sdists of all distributions, and check what an index checks.

``make dist`` runs it. Two builds of one commit are equal byte for byte: every file has the time of the
commit. ``--release`` refuses what must not be published: changes without a commit, and addresses of the
project that nothing was set for (``python -m scripts.project_home``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.project_home import PLACEHOLDER, home

ROOT = Path(__file__).resolve().parent.parent
# The folders with a pyproject.toml; the others depend on the first one.
FOLDERS = (".", "providers/airflow", "providers/prefect")
# For a copy of the files without Git: the first second that a ZIP file can hold, and a bit.
_WITHOUT_COMMIT = "315532800"


def commit_time() -> str:
    """Return the seconds since 1970 of the last commit, or ``SOURCE_DATE_EPOCH`` if it is set."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or _WITHOUT_COMMIT


def build(folder: Path, target: Path, *, kinds: tuple[str, ...] = ("sdist", "wheel")) -> list[Path]:
    """Build a distribution into ``target`` with the hatchling of this Python; return the files."""
    before = set(target.glob("*"))
    chosen = [word for kind in kinds for word in ("-t", kind)]
    command = [sys.executable, "-m", "hatchling", "build", *chosen, "-d", str(target)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": commit_time()}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stdout}{done.stderr}")
    return sorted(set(target.glob("*")) - before)


def main() -> int:
    """Build into ``dist/``; return the exit status of the process."""
    if "--release" in sys.argv[1:]:
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        if changed or home() == PLACEHOLDER:
            what = "a commit of everything" if changed else "the project's address"
            now = "changed files" if changed else PLACEHOLDER
            print(f"dist: expected {what}, got {now}. See CONTRIBUTING.md, Release.", file=sys.stderr)
            return 1
    target = ROOT / "dist"
    shutil.rmtree(target, ignore_errors=True)
    files = [file for folder in FOLDERS for file in build(ROOT / folder, target)]
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
