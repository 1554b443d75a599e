"""Check the types of the documented examples with ``mypy --strict`` and basedpyright.

``make check-examples`` runs it: every Python block of the READMEs and of ``docs/``, except the signatures of
the reference. The blocks of one host are checked together, in the host's environment; blocks that begin with
the name of a file are the project that their page builds, which is checked as a folder of its own.

The errors in ``LEFT_OUT`` come from a host's own types, and a user of the example sees them, too. An entry
that matches no error any more is an error itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "dstack_core/README.md", *ROOT.glob("providers/*/README.md")])
PAGES += sorted(ROOT.glob("docs/**/*.md"))
ENVIRONMENTS = Path(sys.prefix).parent
# The environment of each kind of block.
KINDS = {
    "python": "core",
    "python attach": "core",
    "python airflow": "airflow",
    "python airflow test": "airflow",
    "python airflow installed": "airflow",
    "python prefect": "prefect",
    "python prefect test": "prefect",
    "python prefect runners": "prefect",
}
NO_PROGRAMS = {"python signature": "a signature of the reference"}
FOLDER = ROOT / "build" / "examples"
SOURCES = (ROOT, ROOT / "providers/airflow/src", ROOT / "providers/prefect/src")

LEFT_OUT = {
    r'"XComArg"': "Airflow types the call of a task as XComArg, which is not what the next task takes",
    r"(AsyncCallback|DeadlineAlert|DeadlineReference)\" is unknown|no attribute \"(Async|Deadline)": (
        "Airflow documents these names of airflow.sdk, and its stub file lacks them"
    ),
    r"Coroutine\[Any, Any": "Prefect types a method that is sync or async by its caller as both",
    r'"value".*\bSecret': "Prefect documents Secret(value=<text>), and types it as SecretStr",
    r"prefect_(dask|ray)": "these packages are in another environment",
}
# Tests have fixtures as parameters, which few people annotate: pytest's own documentation does not.
AS_TESTS_ARE = ("--allow-untyped-defs", "--allow-untyped-calls", "--allow-untyped-decorators")

_BLOCK = re.compile(r"^```(?P<info>python[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.py)\n")
_ERROR = re.compile(r"\.py:\d+(:\d+)?:? (- )?error: ")


@dataclass(frozen=True)
class Project:
    """A folder of examples, and the environment it is checked in."""

    environment: str
    folder: Path
    has_tests: bool


def write_examples() -> list[Project]:
    """Write each block to a file named after its page and line, or as its first line names it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    found: dict[Path, Project] = {}
    for page in PAGES:
        text = page.read_text()
        title = re.sub(r"\W", "_", str(page.relative_to(ROOT)).removesuffix(".md"))
        for block in _BLOCK.finditer(text):
            kind = block["info"].strip()
            if kind in NO_PROGRAMS:
                continue
            if kind not in KINDS:
                raise SystemExit(f"{page}: expected one of {', '.join(KINDS)}, got {kind!r}.")
            named = _FILE.match(block["code"])
            folder = FOLDER / KINDS[kind] / (title if named else "alone")
            line = text.count("\n", 0, block.start()) + 1
            path = folder / (named[1] if named else f"{title}_{line}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["code"])
            found[folder] = Project(KINDS[kind], folder, bool(named))
    return list(found.values())


def errors_of(environment: str, projects: list[Project]) -> list[str]:
    """Return what both checkers find in the projects of an environment."""
    return [line for project in projects if project.environment == environment for line in _errors(project)]


def _errors(project: Project) -> Iterator[str]:
    folder, python = project.folder, ENVIRONMENTS / project.environment / "bin" / "python"
    roots = [str(each) for each in (*SOURCES, *(path for path in folder.iterdir() if path.is_dir()))]
    settings = {"typeCheckingMode": "standard", "extraPaths": roots, "reportMissingModuleSource": "none"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    # The environment's projects share what mypy knows of the packages.
    cache = ROOT / ".mypy_cache" / f"examples-{project.environment}"
    strict = ["--strict", *(AS_TESTS_ARE if project.has_tests else ()), "--config-file="]
    commands = (
        [str(python), "-m", "mypy", *strict, f"--cache-dir={cache}", "."],
        [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", str(python)],
    )
    for command in commands:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "MYPYPATH": os.pathsep.join(roots)},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line.strip() for line in lines if _ERROR.search(line)]
        yield from (f"{folder.relative_to(FOLDER)}: {each}" for each in errors)
        if done.returncode not in (0, 1) or (done.returncode == 1 and not errors):
            yield from lines


def main() -> int:
    """Print the errors; return the exit status of the process."""
    projects = write_examples()
    environments = sorted({project.environment for project in projects})
    with ThreadPoolExecutor() as pool:
        found = [
            each for some in pool.map(lambda name: errors_of(name, projects), environments) for each in some
        ]
    errors = [line for line in found if not any(re.search(pattern, line) for pattern in LEFT_OUT)]
    unused = [pattern for pattern in LEFT_OUT if not any(re.search(pattern, line) for line in found)]
    errors += [f"LEFT_OUT: no example has {pattern!r} any more. Remove it." for pattern in unused]
    print(*errors, sep="\n", end="\n" if errors else "")
    print(f"examples: {len(list(FOLDER.rglob('*.py')))} files, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
