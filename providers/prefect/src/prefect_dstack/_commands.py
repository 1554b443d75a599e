"""What ``prefect-dstack ps``, ``cost`` and ``doctor`` do; imported by the one that runs.

The rows, tables and checks of dstack are the core's; here are the block and Prefect's own server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Any

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from dstack_core import Client, ConfigurationError, DstackError
from dstack_core.integration import (
    Finding,
    cost_rows,
    cost_table,
    describe_finding,
    examine,
    is_held_for_a_shell,
    list_project_runs,
    run_rows,
    run_table,
)
from prefect_dstack import credentials as blocks
from prefect_dstack.worker import DstackWorker

# Seconds: a person waits for the answers of ``doctor``.
_DOCTOR_TIMEOUT = 10.0
_MARKER = "prefect:"


def show(command: Callable[[], str]) -> int:
    """Print what a command returns; an error is one line on the standard error and exit status 1."""
    try:
        sys.stdout.write(f"{command()}\n")
    except DstackError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    except HTTPError as error:
        sys.stderr.write(f"{without_prefect(error)}\n")
        return 1
    return 0


def without_prefect(error: HTTPError) -> str:
    """Return the line for a Prefect server that does not answer, of which a block is read."""
    return (
        f"The Prefect server does not answer at {PREFECT_API_URL.value() or 'an address of its own'} "
        f"({type(error).__name__}). Start it (prefect server start), or correct PREFECT_API_URL."
    )


def ps(credentials: str | None, *, finished: bool, every: bool, as_json: bool) -> str:
    """Return the active runs, those of Prefect flow runs unless ``every``."""
    with blocks.open_client(blocks.load(credentials)) as client:
        runs = [
            run
            for run in list_project_runs(client, all=finished)
            if (finished or run.last_status.is_active) and (every or (run.marker or "").startswith(_MARKER))
        ]
        rows, project = run_rows(runs, is_held=is_held_for_a_shell), client.project
    if as_json:
        return _json([asdict(row) for row in rows])
    if rows:
        return run_table(rows)
    kind = "runs" if finished else "active runs"
    return f"Project {project} has no {kind}{'' if every else ' of Prefect flow runs'}."


def cost(credentials: str | None, *, by: str, since: str | None, as_json: bool) -> str:
    """Return what runs have cost."""
    # Before the runs are read, which may take many pages.
    cost_rows([], by=by, since=since)
    with blocks.open_client(blocks.load(credentials)) as client:
        rows = cost_rows(list_project_runs(client, all=True), by=by, since=since)
    return _json([asdict(row) for row in rows]) if as_json else cost_table(rows)


def doctor(credentials: str | None, *, run: str | None, as_json: bool) -> int:
    """Show what each check found."""
    findings = []
    for found in _findings(credentials, run):
        findings.append(found)
        if not as_json:
            sys.stdout.write(f"{describe_finding(found)}\n")
    if as_json:
        sys.stdout.write(f"{_json([asdict(found) for found in findings])}\n")
    return 1 if any(found.state == "error" for found in findings) else 0


def _findings(credentials: str | None, run: str | None) -> Iterator[Finding]:
    reachable = yield from _prefect()

    def connect() -> Client:
        if credentials is not None and not reachable:
            raise ConfigurationError(
                f"credentials: expected the block {credentials}, got no answer from Prefect, which has it."
            )
        return blocks.open_client(blocks.load(credentials), timeout=_DOCTOR_TIMEOUT, retry_budget=0)

    yield from examine(connect, run_name=run)


def _prefect() -> Generator[Finding, None, bool]:
    url = PREFECT_API_URL.value()
    if not url:
        # Without it Prefect starts a server of its own, which knows no flow run.
        yield Finding(
            "Prefect",
            "warning",
            "PREFECT_API_URL: expected the address of your Prefect server, got none.",
            "Set it: prefect config set PREFECT_API_URL=http://HOST:4200/api",
        )
        return False
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            yield Finding(
                "Prefect",
                "error",
                f"The Prefect server does not answer at {url} ({type(problem).__name__}).",
                "Start it (prefect server start), or correct PREFECT_API_URL.",
            )
            return False
        yield Finding("Prefect", "ok", f"The server answers at {url}.")
        pools = [pool for pool in client.read_work_pools() if pool.type == DstackWorker.type]
        for pool in pools:
            if str(getattr(pool.status, "value", pool.status)) == "READY":
                yield Finding("Prefect work pool", "ok", f"{pool.name} has a worker.")
            else:
                yield Finding(
                    "Prefect work pool",
                    "warning",
                    f"{pool.name} has no worker; its flow runs wait.",
                    f"Start one: prefect worker start --pool {pool.name}",
                )
    return True


def _json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2, default=_json_value)


def _json_value(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)
