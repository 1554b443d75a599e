"""What ``prefect-dstack ps``, ``cost`` and ``doctor`` do; imported by the one that runs.

The rows, tables and checks of dstack are the core's; here is the block; ``_doctor`` checks Prefect.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from httpx import HTTPError
from prefect.settings import PREFECT_API_URL

from dstack_core import Client, ConfigurationError, DstackError
from dstack_core.integration import (
    Finding,
    TextStyle,
    command_limits,
    cost_rows,
    examine,
    show_costs,
    show_findings,
    show_runs,
    tag_value,
)
from prefect_dstack import credentials as blocks
from prefect_dstack._doctor import prefect_findings

# Seconds: a person waits for the answers of ``doctor``.
_DOCTOR_TIMEOUT = 10.0


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
    owner, owners = ("", "") if every else ("prefect:", " of Prefect flow runs")
    with _client(credentials) as client:
        return show_runs(
            client,
            all=finished,
            owner=owner,
            owners=owners,
            as_json=as_json,
            style=TextStyle.of(sys.stdout),
        )


def cost(
    credentials: str | None,
    *,
    by: str,
    flow: str | None,
    since: str | None,
    until: str | None,
    as_json: bool,
    as_csv: bool,
) -> str:
    """Return what runs have cost, those of all owners unless ``flow``."""
    cost_rows([], by=by, since=since, until=until)
    with _client(credentials) as client:
        return show_costs(
            client,
            by=by,
            since=since,
            until=until,
            # As the runs of its tasks are tagged.
            tags={"prefect-flow": tag_value(flow, default="flow")} if flow else None,
            as_json=as_json,
            as_csv=as_csv,
            style=TextStyle.of(sys.stdout),
        )


def doctor(credentials: str | None, *, run: str | None, as_json: bool) -> int:
    """Show what each check found."""
    return show_findings(_findings(credentials, run), sys.stdout, as_json=as_json)


def _client(credentials: str | None) -> Client:
    """Return a client for a command that a person waits for: it reports a dead server soon."""
    return Client.from_config(**command_limits(blocks.target_of(blocks.load(credentials))))


def _findings(credentials: str | None, run: str | None) -> Iterator[Finding]:
    reachable = yield from prefect_findings(credentials)

    def connect() -> Client:
        if credentials is not None and not reachable:
            raise ConfigurationError(
                f"credentials: expected the block {credentials}, got no answer from Prefect, which has it."
            )
        return blocks.open_client(blocks.load(credentials), timeout=_DOCTOR_TIMEOUT, retry_budget=0)

    yield from examine(connect, run_name=run)
