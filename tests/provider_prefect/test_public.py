"""What the package shows, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

import prefect_dstack
from prefect_dstack import arun_task, run_task

ROOT = Path(__file__).parents[2]
SOURCE = Path(prefect_dstack.__file__).parent
_IMPORT = """
import json, sys, time
began = time.perf_counter()
from prefect import flow, task
before = set(sys.modules)
start = time.perf_counter()
import prefect_dstack
end = time.perf_counter()
print(json.dumps([(end - start) / (start - began), sorted(set(sys.modules) - before)]))
"""
# 0.25 s where Prefect's own import takes 1.83 s: a share, since a busy machine slows down both.
_SHARE = 0.25 / 1.83


def test_the_public_names_are_these() -> None:
    assert prefect_dstack.__all__ == [
        "RUN_INPUTS",
        "DstackCredentials",
        "DstackFlow",
        "DstackFlowRunFuture",
        "DstackRun",
        "DstackRunHandle",
        "DstackWorker",
        "MachineOptions",
        "RunDict",
        "RunInputs",
        "__version__",
        "acreate_fleet",
        "acreate_volume",
        "adelete_fleet",
        "adelete_volume",
        "adeploy_service",
        "aget_run",
        "areap_runs",
        "arun_and_report",
        "arun_task",
        "astop_run",
        "asubmit_run",
        "await_for_offer",
        "await_for_run",
        "await_for_service",
        "create_fleet",
        "create_volume",
        "delete_fleet",
        "delete_volume",
        "deploy_service",
        "dstack",
        "dstack_fleet",
        "dstack_task",
        "get_run",
        "reap_runs",
        "retry_on",
        "run_and_report",
        "run_task",
        "stop_dstack_runs",
        "stop_run",
        "stop_runs_on_cancellation",
        "stop_runs_on_crash",
        "submit_run",
        "sync_secrets",
        "wait_for_offer",
        "wait_for_run",
        "wait_for_service",
    ]
    for name in prefect_dstack.__all__:
        assert getattr(prefect_dstack, name)


def test_prefect_finds_the_collection() -> None:
    (entry,) = [
        entry for entry in entry_points(group="prefect.collections") if entry.name == "prefect_dstack"
    ]
    loaded = entry.load()
    assert loaded.DstackWorker is prefect_dstack.DstackWorker
    assert loaded.DstackCredentials is prefect_dstack.DstackCredentials
    assert version("prefect-dstack") == prefect_dstack.__version__


def test_the_twins_have_equal_parameters() -> None:
    sync, twin = (inspect.signature(task.fn) for task in (run_task, arun_task))
    assert sync.parameters == twin.parameters
    assert inspect.iscoroutinefunction(arun_task.fn)
    assert not inspect.iscoroutinefunction(run_task.fn)


def test_the_tasks_leave_retries_and_caches_to_the_caller() -> None:
    for task in (run_task, arun_task):
        assert task.retries == 0
        assert task.with_options(retries=2).retries == 2


def test_importing_loads_no_client() -> None:
    share, modules = _import()
    others = {name.partition(".")[0] for name in modules}
    assert others == {"prefect_dstack"}
    assert not {"prefect_dstack.worker", "prefect_dstack.flows", "prefect_dstack.decorators"} & set(modules)
    for _ in range(4):
        if share <= _SHARE:
            break
        share = min(share, _import()[0])
    assert share <= _SHARE


def test_only_the_public_api_of_prefect_is_used() -> None:
    """The one private sign of a cancellation is read in one module, which tolerates its absence."""
    modules = {path.name: ast.parse(path.read_text()) for path in SOURCE.glob("*.py")}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefect."):
                imported = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                assert not [part for part in imported if part.startswith("_")], (name, node.lineno)
            # Private attributes of Prefect's classes are not used: each private attribute is defined here.
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                # Named tuples have that one, and it is public.
                is_public = node.attr == "_asdict"
                assert is_public or node.attr in _defined(tree), (name, node.lineno, node.attr)
            if isinstance(node, ast.Constant) and node.value == "_cancel_events":
                assert name == "_cancellation.py"


def _defined(tree: ast.Module) -> set[str]:
    """Return the attributes a module's classes set on ``self`` or define."""
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


def _pinned(lane: str) -> str:
    found = re.search(r"^prefect==(.*)$", (ROOT / f"constraints/{lane}.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_oldest_prefect_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    newest, between, oldest = map(_pinned, ("prefect", "prefect-3.8", "prefect-oldest"))
    allowed = tomllib.loads((ROOT / "providers/prefect/pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    assert f"prefect>={oldest}" in allowed
    assert f"Tested with Prefect {newest}, {between} and {oldest}" in (ROOT / "docs/prefect.md").read_text()
    assert _pinned("prefect-runners") == newest


def test_no_other_name_is_found() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prefect_dstack.no_such_name


def _import() -> tuple[float, list[str]]:
    reply: Any = json.loads(subprocess.check_output([sys.executable, "-c", _IMPORT], text=True))
    return reply[0], reply[1]
