"""The table of statuses: what its rows mean, that the docs show it, and that it is the only one."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_core import Outcome, RunFailedError, RunStatus, RunStoppedError
from dstack_core._wire.runs import Machine, Submission, parse_run
from dstack_core.models.statuses import BY_JOB, BY_RUN, RESTARTING_SIGN, Phase, job_status, run_status
from tests.core.scripted import DATA, run_json

ROOT = Path(__file__).parent.parent.parent
# Of runs and jobs, and of fleets, their machines and volumes.
TABLE_FILES = [ROOT / "dstack_core" / "models" / name for name in ("statuses.py", "resource_statuses.py")]
PROVIDERS = [ROOT / "providers" / name / "src" for name in ("airflow", "prefect")]
# The embedded server is the second, independent writer of the protocol: it has a table of its own.
ASKING = sorted(
    path
    for folder in [ROOT / "dstack_core", *PROVIDERS]
    for path in folder.rglob("*.py")
    if path not in TABLE_FILES and ROOT / "dstack_core" / "local" not in path.parents
)
STATUSES = {str(status) for status in RunStatus} | {raw for raw, _ in BY_RUN} | set(BY_JOB)


@pytest.mark.parametrize("status", RunStatus)
def test_a_status_is_in_exactly_one_phase(status: RunStatus) -> None:
    phases = [status.is_before_start, status.is_stopping, status.is_finished]
    assert phases.count(True) == (0 if status._row.phase is Phase.RUNNING else 1)
    assert status.is_active == (not status.is_finished)
    assert status.is_ending == (status.is_stopping or status.is_finished)
    assert status.is_finished == (status.is_success or status.was_stopped or status is RunStatus.FAILED)


@pytest.mark.parametrize("status", RunStatus)
def test_a_progress_bar_never_goes_back_from_phase_to_phase(status: RunStatus) -> None:
    earlier = list(Phase).index(status._row.phase)
    assert (status.percent == 100.0) == status.is_finished
    if not status.is_finished:
        behind = [other.percent for other in RunStatus if list(Phase).index(other._row.phase) < earlier]
        assert all(percent <= status.percent for percent in behind)


@pytest.mark.parametrize("status", RunStatus)
def test_a_status_survives_another_process(status: RunStatus) -> None:
    assert pickle.loads(pickle.dumps(status)) is status  # noqa: S301 - our own
    assert json.loads(json.dumps(status)) == status.value


@pytest.mark.parametrize(("key", "status"), BY_RUN.items(), ids=str)
def test_what_a_server_sends_is_mapped(key: tuple[str, str | None], status: RunStatus) -> None:
    raw, sign = key
    kind, _, word = (sign or "").partition(": ")
    message, reason = (word if kind == name else None for name in ("message", "reason"))
    restarting = sign == RESTARTING_SIGN
    assert run_status(raw, message=message, reason=reason, restarting=restarting) is status


def test_no_row_hides_another() -> None:
    rows = [status._row for status in RunStatus]
    assert len(BY_RUN) == sum(len(row.run) for row in rows)
    assert len(BY_JOB) == sum(row.job is not None for row in rows)
    # Each raw status also has a row without a sign, because a message may be missing (PROTOCOL 2.2).
    assert {raw for raw, sign in BY_RUN if sign} <= {raw for raw, sign in BY_RUN if sign is None}


@pytest.mark.parametrize(("raw", "status"), BY_JOB.items())
def test_the_attempt_of_a_job_uses_the_table(raw: str, status: RunStatus) -> None:
    attempt = Submission("id", 0, raw, None, None, None, None, None, Machine())
    assert attempt.mapped_status is status
    assert (attempt.may_have_logs, attempt.is_finished) == (not status.is_before_start, status.is_finished)


@pytest.mark.parametrize("status", [status for status in RunStatus if status.is_finished])
def test_an_outcome_uses_the_table(status: RunStatus) -> None:
    facts: dict[str, Any] = {"run_name": "train", "run_id": "id", "project": "main", "message": "ended"}
    outcome = Outcome.from_dict({**facts, "status": str(status), "cost": 0.0, "url": "http://server"})
    assert outcome.succeeded == status.is_success
    if not outcome.succeeded:
        with pytest.raises(RunStoppedError if status.was_stopped else RunFailedError):
            outcome.raise_for_status()


@pytest.mark.parametrize("raw", ["hibernating", "with-dashes", ""])
def test_an_unknown_status_is_kept_as_received(raw: str) -> None:
    attempt = Submission("id", 0, raw, None, None, None, None, None, Machine())
    assert (attempt.status, attempt.may_have_logs, attempt.is_finished) == (raw, True, False)
    if raw:
        run = parse_run(run_json(raw))
        assert (str(run.status), run.raw_status, run.is_active) == (raw, raw, True)
        assert (run.status.is_before_start, run.status.is_ending) == (False, False)
        assert 0 < run.status.percent < 100
        assert str(job_status(raw)) == raw


def test_every_status_in_a_recorded_reply_is_in_the_table() -> None:
    runs, jobs = set(), set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if "run_spec" in value and "status" in value:
                runs.add(value["status"])
            if "submission_num" in value:
                jobs.add(value["status"])
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(item)

    for path in DATA.glob("runs_*.json"):
        visit(json.loads(path.read_text()))
    assert "running" in runs & jobs
    assert runs <= {raw for raw, _ in BY_RUN}
    assert jobs <= set(BY_JOB)


def test_the_table_has_the_statuses_that_a_server_knows() -> None:
    known = json.loads((DATA / "openapi_0.22.5.json").read_text())["components"]["schemas"]
    assert {raw for raw, _ in BY_RUN} >= set(known["RunStatus"]["enum"])
    assert set(BY_JOB) >= set(known["JobStatus"]["enum"])


def docs_row(status: RunStatus) -> str:
    """Return the row of a status in the table of docs/how-it-works.md."""
    row = status._row
    sent = ", ".join(f"`{raw}`" for raw in row.run) or "never"
    sign = f" ({row.sign})" if row.sign else ""
    job = f"`{row.job}`" if row.job else ""
    return f"| `{status.name}` | {row.phase.value} | {sent}{sign} | {job} | {row.percent:.0f} |"


def test_the_docs_show_the_table() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    section = page.partition("\n## Statuses\n")[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| `")]
    assert shown == [docs_row(status) for status in RunStatus], "docs/how-it-works.md, Statuses"


@pytest.mark.parametrize("status", RunStatus)
def test_the_documented_api_has_a_row_for_it(status: RunStatus) -> None:
    assert f"\n| `{status.name}`" in (ROOT / "docs" / "documented-api.md").read_text()


def named_status(node: ast.AST) -> str | None:
    """Return the status that an expression names, as text or as a member of ``RunStatus``."""
    if isinstance(node, ast.Constant) and node.value in STATUSES:
        return str(node.value)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "RunStatus":
        return node.attr.lower() if node.attr.isupper() else None
    return None


def second_tables(tree: ast.AST) -> Iterator[str]:
    """Yield the places in code that decide by statuses without the table."""
    for node in ast.walk(tree):
        items: list[ast.AST] = []
        if isinstance(node, ast.Set | ast.List | ast.Tuple):
            items = list(node.elts)
        elif isinstance(node, ast.Dict):
            items = [key for key in node.keys if key is not None]
            if len([value for value in node.values if named_status(value)]) > 1:
                items = list(node.values)
        elif isinstance(node, ast.BoolOp):
            items = [
                side for each in node.values if isinstance(each, ast.Compare) for side in each.comparators
            ]
        elif isinstance(node, ast.Match):
            items = [each.value for each in ast.walk(node) if isinstance(each, ast.MatchValue)]
        elif isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Attribute) and side.attr in ("status", "raw_status", "last_status")
            for side in [node.left, *node.comparators]
        ):
            texts = [side for side in [node.left, *node.comparators] if isinstance(side, ast.Constant)]
            items = [*texts, *texts]
        found = {name for item in items if (name := named_status(item))}
        if len(found) > 1 or (isinstance(node, ast.Compare) and found):
            yield f"line {getattr(node, 'lineno', '?')}: {', '.join(sorted(found))}"


@pytest.mark.parametrize("path", ASKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_there_is_no_second_table(path: Path) -> None:
    assert [*second_tables(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    "code",
    [
        "_FINAL = frozenset({'done', 'failed'})",
        "_PERCENT = {'pending': 5.0, 'running': 50.0}",
        "_MAPPED = {'a': RunStatus.STOPPING, 'b': RunStatus.ABORTING}",
        "x = status in (RunStatus.TERMINATED, RunStatus.ABORTED)",
        "x = status == 'done' or status == 'failed'",
        "x = run.raw_status == 'terminating'",
        "match status:\n case 'done': pass\n case 'failed': pass",
    ],
)
def test_a_second_table_is_found(code: str) -> None:
    assert [*second_tables(ast.parse(code))]
