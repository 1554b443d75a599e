"""Print what a newcomer has to read: the files and functions that a submit and tasks pass, and package sizes.

A walk is measured by executing it on an embedded dstack server, while a profiler records which functions of
the project are called, in every thread. Modules, classes, lambdas and comprehensions do not count, nor does
the embedded server.

Run it with the Python of an environment; it does the walks that are possible there::

    python -m scripts.walks [--walk NAME ...] [--json]

A comment line contains only a comment; a code line is any other that is neither empty nor in a docstring.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CORE = REPOSITORY / "dstack_core"
AIRFLOW = REPOSITORY / "providers" / "airflow" / "src" / "airflow_provider_dstack"
PREFECT = REPOSITORY / "providers" / "prefect" / "src" / "prefect_dstack"
PACKAGES = {
    "dstack_core/_flow": CORE / "_flow",
    "dstack_core/_shared": CORE / "_shared",
    "dstack_core/_attach": CORE / "_attach",
    "dstack_core": CORE,
    "airflow_provider_dstack": AIRFLOW,
    "prefect_dstack": PREFECT,
}
LONGEST = 5
_DAG = """
from airflow.sdk import DAG
from airflow_provider_dstack.operators import DstackRunOperator

with DAG("{name}") as dag:
    DstackRunOperator(task_id="train", configuration="type: task\\ncommands: [{command}]", {arguments})
"""
# A worker follows a deferrable task's run for 5 s before handing it over; this run takes longer.
_AIRFLOW_TASKS = (
    ("Airflow task", "echo hello", ""),
    ("deferred Airflow task", "sleep 15; echo hello", "deferrable=True"),
)
_FLOW = """
from prefect import flow
from prefect_dstack import run_task

@flow
def walk():
    return run_task({"type": "task", "commands": ["echo hello"]})
"""


@dataclass
class Walk:
    """The files and functions of the project that were passed."""

    name: str
    seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def files(self) -> list[str]:
        """Return the files, sorted."""
        return sorted({file for file, _ in self.seen})


@dataclass(frozen=True)
class Size:
    """The sizes of a package, including the folders below it."""

    package: str
    files: int
    code: int
    comments: int
    longest: list[tuple[str, int]]

    @property
    def per_100(self) -> float:
        """Return the comment lines per 100 code lines."""
        return round(100 * self.comments / self.code, 1) if self.code else 0.0


@contextmanager
def watched(name: str, folders: Iterable[Path], without: Iterable[Path] = ()) -> Iterator[Walk]:
    """Record the functions of the folders that are called in the block, by any thread that starts in it."""
    walk, inside, outside = (
        Walk(name),
        tuple(f"{one}/" for one in folders),
        tuple(f"{one}/" for one in without),
    )

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(inside):
            return
        # Class bodies and modules are called too, but without locals of their own.
        is_function = bool(code.co_flags & inspect.CO_NEWLOCALS) and not code.co_name.startswith("<")
        if is_function and not code.co_filename.startswith(outside):
            walk.seen.add((code.co_filename, code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def project(name: str) -> Any:
    """Watch the whole project except the embedded server."""
    return watched(name, [CORE, AIRFLOW, PREFECT], without=[CORE / "local"])


def submit() -> Iterator[Walk]:
    """Submit a run with a client."""
    from dstack_core import Task
    from dstack_core.local import LocalServer

    with LocalServer() as server, server.client() as client:
        with project("submit") as walk:
            client.runs.submit(Task(commands=["true"]))
        yield walk


def airflow() -> Iterator[Walk]:
    """Run one task in the worker and one that is deferred, including its trigger."""
    from dstack_core.local import LocalServer
    from scripts import demo_airflow

    with tempfile.TemporaryDirectory(prefix="walks-") as home, LocalServer() as server:
        demo_airflow.configure_airflow(home)
        folder = Path(home) / "dags"
        folder.mkdir()
        os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(folder)
        os.environ["AIRFLOW_CONN_DSTACK_DEFAULT"] = json.dumps(
            {"conn_type": "dstack", "host": server.url, "login": server.project, "password": server.token}
        )
        demo_airflow.migrate()
        for name, command, arguments in _AIRFLOW_TASKS:
            file = folder / f"{name.replace(' ', '_')}.py"
            file.write_text(_DAG.format(name=file.stem, command=command, arguments=arguments))
            dag = load(file).dag
            with project(name) as walk:
                run = dag.test()
            if str(run.state) != "success":
                raise RuntimeError(f"{name}: expected success, got {run.state}.")
            if arguments and str(AIRFLOW / "triggers.py") not in walk.files:
                raise RuntimeError(
                    f"{name}: expected a trigger, got none. The run ended before the deferral."
                )
            yield walk


def prefect() -> Iterator[Walk]:
    """Run a task of a flow."""
    from dstack_core.local import LocalServer
    from scripts import demo_prefect

    with tempfile.TemporaryDirectory(prefix="walks-") as directory, LocalServer() as server:
        home, port = Path(directory), demo_prefect.free_port()
        demo_prefect.configure_prefect(home, port)
        for name, value in (("SERVER_URL", server.url), ("PROJECT", server.project), ("TOKEN", server.token)):
            os.environ[f"DSTACK_{name}"] = value
        file = home / "walk.py"
        file.write_text(_FLOW)
        with demo_prefect.prefect_server(home, port):
            flow = load(file).walk
            with project("Prefect task") as walk:
                flow()
        yield walk


# The module that an environment must have to do the walk.
WALKS: dict[str, tuple[str, Callable[[], Iterator[Walk]]]] = {
    "submit": ("dstack_core", submit),
    "airflow": ("airflow", airflow),
    "prefect": ("prefect", prefect),
}


def load(file: Path) -> Any:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count_lines(text: str) -> tuple[int, int]:
    """Return the number of code lines and of comment lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in docstrings]
    comments = sum(line.startswith("#") for line in lines)
    return sum(bool(line) for line in lines) - comments, comments


def size_of(package: str, folder: Path, *, longest: int = LONGEST) -> Size:
    """Count the files and lines of a package."""
    lengths, code, comments = [], 0, 0
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        counted = count_lines(text)
        code, comments = code + counted[0], comments + counted[1]
        lengths.append((str(path.relative_to(folder)), len(text.splitlines())))
    lengths.sort(key=lambda item: (-item[1], item[0]))
    return Size(package, len(lengths), code, comments, lengths[:longest])


def total(sizes: Iterable[Size]) -> Size:
    """Add up packages that do not contain each other."""
    parts = list(sizes)
    longest = sorted(
        ((f"{one.package}/{file}", lines) for one in parts for file, lines in one.longest),
        key=lambda item: (-item[1], item[0]),
    )
    return Size(
        "total",
        sum(one.files for one in parts),
        sum(one.code for one in parts),
        sum(one.comments for one in parts),
        longest[:LONGEST],
    )


def sizes() -> list[Size]:
    """Return the sizes of the packages, and their sum."""
    found = [size_of(package, folder) for package, folder in PACKAGES.items()]
    return [*found, total(one for one in found if "/" not in one.package)]


def as_markdown(walks: Iterable[Walk], packages: Iterable[Size]) -> str:
    """Return two tables."""
    lines = ["| walk | files | functions |", "|---|---|---|"]
    lines += [f"| {walk.name} | {len(walk.files)} | {len(walk.seen)} |" for walk in walks]
    lines += [
        "",
        "| package | files | code lines | comments per 100 | longest files |",
        "|---|---|---|---|---|",
    ]
    for one in packages:
        longest = ", ".join(f"{file} {count}" for file, count in one.longest)
        lines.append(f"| {one.package} | {one.files} | {one.code} | {one.per_100} | {longest} |")
    return "\n".join(lines)


def as_json(walks: Iterable[Walk], packages: Iterable[Size]) -> str:
    """Return the same data as JSON, with the names of the files and functions."""
    shown = {
        walk.name: {
            "files": [str(Path(file).relative_to(REPOSITORY)) for file in walk.files],
            "functions": sorted(
                f"{Path(file).relative_to(REPOSITORY)}:{function}" for file, function in walk.seen
            ),
        }
        for walk in walks
    }
    return json.dumps(
        {
            "walks": shown,
            "packages": [{**asdict(one), "comments_per_100": one.per_100} for one in packages],
        },
        indent=1,
    )


def main() -> None:
    """Do the walks of this environment and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--walk", action="append", choices=WALKS, help="do only this walk, instead of all possible ones"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the files and functions")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    walks: list[Walk] = []
    # What the hosts print does not belong in the tables.
    with redirect_stdout(sys.stderr):
        for name in given.walk or WALKS:
            module, measure = WALKS[name]
            if importlib.util.find_spec(module) is not None:
                walks += measure()
    print((as_json if given.json else as_markdown)(walks, sizes()))


if __name__ == "__main__":
    main()
