"""Check the types of the examples in the READMEs with ``mypy --strict`` and basedpyright.

``make check-examples`` runs it. The examples of one host are checked together, in the host's environment. Two
kinds of error are the host's own and are left out: Airflow types the call of a task as ``XComArg``, which is
not the value that the next task takes; Prefect types a method that is sync or async by its caller as both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "dstack_core/README.md", "providers/airflow/README.md", "providers/prefect/README.md")
KINDS = {"python": "core", "python airflow": "airflow", "python prefect": "prefect"}
FOLDER = ROOT / "build" / "examples"
SOURCES = (ROOT, ROOT / "providers/airflow/src", ROOT / "providers/prefect/src")
_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_OF_THE_HOST = re.compile(r'"XComArg"|Coroutine\[Any, Any')
_ERROR = re.compile(r"\.py:\d+(:\d+)?:? (- )?error: ")


def write_examples() -> dict[str, list[str]]:
    """Write each block to a file named after its page and line; return the names by environment."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    written: dict[str, list[str]] = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        for found in _BLOCK.finditer(text):
            environment = KINDS.get(found["info"].strip())
            if environment is None:
                continue
            line = text.count("\n", 0, found.start()) + 1
            name = re.sub(r"\W", "_", page.removesuffix(".md")) + f"_{line}.py"
            (FOLDER / environment).mkdir(parents=True, exist_ok=True)
            (FOLDER / environment / name).write_text(found["code"])
            written.setdefault(environment, []).append(name)
    return written


def errors_of(environment: str) -> list[str]:
    """Return what both checkers find in the examples of an environment."""
    folder, python = FOLDER / environment, ROOT / ".venv" / environment / "bin" / "python"
    paths = [str(path) for path in SOURCES]
    settings = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "extraPaths": paths}
    (folder / "pyrightconfig.json").write_text(json.dumps({**settings, "reportMissingModuleSource": "none"}))
    cache = ROOT / ".mypy_cache" / f"examples-{environment}"
    commands = (
        [str(python), "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", "."],
        [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", str(python)],
    )
    found: list[str] = []
    for command in commands:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "MYPYPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = (done.stdout + done.stderr).splitlines()
        found += [line for line in lines if _ERROR.search(line) and not _OF_THE_HOST.search(line)]
        if done.returncode not in (0, 1):
            found += lines
    return found


def main() -> int:
    """Print the errors; return the exit status of the process."""
    written = write_examples()
    errors = [error for environment in written for error in errors_of(environment)]
    print(*errors, sep="\n", end="\n" if errors else "")
    print(f"examples: {sum(map(len, written.values()))} files, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
