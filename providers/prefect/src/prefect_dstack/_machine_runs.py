"""The dstack runs that flow runs of a work pool run in: name them, find them, submit each once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._code import git_credentials_named
from prefect_dstack._connect import aload, aload_git, open_async_client
from prefect_dstack._core_log import client_warnings_in
from prefect_dstack._names import worker_marker_prefix

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun
    from prefect_dstack._machine import DstackJobConfiguration

# A worker has time: an outage of the dstack server must not fail the flow run.
SUBMIT_BUDGET = 300.0


async def submit_once(
    client: AsyncClient, flow_run_id: UUID, configuration: DstackJobConfiguration, logger: Any = None
) -> AsyncRun:
    """Return the active run of the flow run, or a new one. Raises ``ConfigurationError``, server errors.

    ``logger`` gets the client's warnings.

    Two workers that do this at the same moment get the same run: name and marker are equal (PROTOCOL 1.4).
    """
    from dstack_core import RunNotFoundError

    configuration.check_reach(client.server_url)
    active, last = await _known(client, flow_run_id)
    if active is not None:
        return active
    block = await aload(configuration.credentials)
    submission = configuration.submission(await aload_git(block, configuration.git()))
    for warning in submission.warnings if logger is not None else ():
        logger.warning(warning)
    arguments = {
        **submission.arguments,
        "run_name": _name(flow_run_id, last + 1),
        "marker": f"{worker_marker_prefix(flow_run_id)}{last + 1}",
        "retry_budget": SUBMIT_BUDGET,
        "verify_ports": False,
    }
    with git_credentials_named(), client_warnings_in(logger):
        if not submission.code.arguments:
            return await client.runs.submit(submission.configuration, **arguments)
        async with open_async_client(block, code=submission.code) as with_code:
            await with_code.runs.submit(submission.configuration, **arguments)
    run = await client.runs.get(arguments["run_name"], retry_budget=SUBMIT_BUDGET)
    if run is None:
        raise RunNotFoundError(f"Run {arguments['run_name']} was submitted, and deleted a moment later.")
    return run


async def find(client: AsyncClient, flow_run_id: UUID) -> AsyncRun | None:
    """Return the flow run's active run, else its last one, else None. Raises the server errors."""
    active, last = await _known(client, flow_run_id)
    return active or (await client.runs.get(_name(flow_run_id, last)) if last else None)


def identifier(project: str, run_name: str) -> str:
    """Return how Prefect knows the infrastructure of a flow run."""
    return f"{project}:{run_name}"


async def _known(client: AsyncClient, flow_run_id: UUID) -> tuple[AsyncRun | None, int]:
    """Return the active run, or None, and the highest number in use."""
    prefix = worker_marker_prefix(flow_run_id)
    for run in await client.runs.list():
        if (run.marker or "").startswith(prefix) and run.outcome() is None:
            return run, 0
    number = 0
    while (found := await client.runs.get(_name(flow_run_id, number + 1))) is not None:
        if found.outcome() is None and (found.marker or "").startswith(prefix):
            return found, 0
        number += 1
    return None, number


def _name(flow_run_id: UUID, number: int) -> str:
    return f"pf-{str(flow_run_id)[-12:]}-w{number}"
