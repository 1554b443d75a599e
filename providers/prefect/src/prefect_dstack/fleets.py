"""Fleets for flow runs: the tasks ``create_fleet`` and ``delete_fleet``, and ``with dstack_fleet(...)``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import anyio
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal

from prefect_dstack._cancellation import StopRequested
from prefect_dstack._checks import check_seconds
from prefect_dstack._current_fleet import BlockFleet, enter_fleet, leave_fleet
from prefect_dstack._names import task_owner
from prefect_dstack._owned_fleets import (
    BEFORE_THE_KILL_SECONDS,
    CREATE_SECONDS,
    DELETE_SECONDS,
    LEFT,
    FleetJob,
    described,
    fleet_info,
    log_deleted,
    name_and_marker,
    prepare_fleet,
)
from prefect_dstack._resource_names import resource_owner
from prefect_dstack._waits import Waits, cancelled
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from contextvars import Token
    from types import TracebackType

    from dstack_core import Fleet, FleetLike
    from prefect_dstack.credentials import DstackCredentials

CreatedFleet: TypeAlias = str | Mapping[str, Any]
"""The name of a fleet, or what ``create_fleet`` returned."""

# What ends a ``with`` from outside, so that its process is about to be killed.
_INTERRUPTS = (TerminationSignal, SystemExit, asyncio.CancelledError, StopRequested)


@task(cache_policy=NO_CACHE, retries=0)
def create_fleet(
    configuration: FleetLike,
    credentials: CredentialsLike = None,
    *,
    name: str | None = None,
    keep: bool = False,
    timeout: float = CREATE_SECONDS,
    retry_budget: float = 600.0,
) -> dict[str, Any]:
    """Create a fleet and wait until runs can use it.

    Executing the same flow run again finds its fleet. If the flow run is cancelled, crashes, or ends without
    ``delete_fleet``, the hooks of this package or its reaper delete the fleet. ``dstack_fleet`` deletes it
    where its ``with`` ends.

    Args:
        configuration: A ``FleetConfiguration``, a dict as in YAML, or the path of a ``type: fleet`` file.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        name: The fleet's name. Default: one made from the flow run, with the configuration's ``name`` in it.
        keep: Leave the fleet to other flow runs: it has the ``name`` given here or in the configuration,
            every flow with ``keep=True`` updates it in place, and no hook and no reaper deletes it. Default:
            False.
        timeout: Seconds to wait for the machines that the configuration creates at once (``nodes: 2``). With
            ``nodes: 0..2`` there is nothing to wait for. Default: 1200.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.

    Returns:
        A dict of JSON-plain values: ``name``, which ``fleets`` of a run takes, ``fleet_id``, ``status``,
        ``marker``, ``machines`` (names of those that are ready) and ``price_per_hour`` (USD).

    Raises:
        ConfigurationError: A value is wrong; nothing was created.
        ResourceNameTakenError: A fleet of that name is not this flow run's; nothing was changed.
        WaitTimeoutError: The machines were not ready in time; the fleet is deleted again.
        ServerError: The other server errors.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import create_fleet, delete_fleet, run_task


        @flow
        def train() -> None:
            fleet = create_fleet({"nodes": "0..2", "resources": "24GB.."})
            try:
                run_task({"type": "task", "commands": ["python train.py"], "fleets": [fleet["name"]]})
            finally:
                delete_fleet(fleet)
        ```
    """
    block = load(credentials)
    job = prepare_fleet(
        configuration, task_owner(), name=name, keep=keep, timeout=timeout, retry_budget=retry_budget
    )
    try:
        return fleet_info(_create(job, block))
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, f"Fleet {job.name} is not needed."))


@task(cache_policy=NO_CACHE, retries=0)
async def acreate_fleet(
    configuration: FleetLike,
    credentials: CredentialsLike = None,
    *,
    name: str | None = None,
    keep: bool = False,
    timeout: float = CREATE_SECONDS,
    retry_budget: float = 600.0,
) -> dict[str, Any]:
    """Create a fleet and wait until runs can use it: the async twin of ``create_fleet``.

    Parameters, result and errors are the same.
    """
    block = await aload(credentials)
    job = prepare_fleet(
        configuration, task_owner(), name=name, keep=keep, timeout=timeout, retry_budget=retry_budget
    )
    try:
        return fleet_info(await _acreate(job, block))
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, f"Fleet {job.name} is not needed."))


@task(cache_policy=NO_CACHE, retries=0)
def delete_fleet(
    fleet: CreatedFleet, credentials: CredentialsLike = None, *, timeout: float = DELETE_SECONDS
) -> bool:
    """Delete a fleet with its machines, once the runs that use it have ended.

    Args:
        fleet: What ``create_fleet`` returned, or the name of a fleet. With the former, a fleet of another
            owner that has the name by now is left alone.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment.
        timeout: Seconds to wait for its runs and its machines. Default: 600.

    Returns:
        Whether there was such a fleet.

    Raises:
        ConfigurationError: A value is wrong.
        ResourceNameTakenError: The fleet is of another owner; nothing was deleted.
        WaitTimeoutError: It was not deleted in time.
        ServerError: The other server errors.

    Example:
        ``delete_fleet("nightly-fleet")``
    """
    name, marker = name_and_marker("fleet", fleet)
    check_seconds(timeout=timeout)
    waits = Waits(task_owner())
    try:
        with open_client(load(credentials), retry_budget=timeout) as client:
            found = client.fleets.delete(
                name, marker=marker, until="deleted", wait_for_runs=True, timeout=timeout, sleep=waits.sleep
            )
            return log_deleted("Fleet", name, found)
    except StopRequested as request:
        return cast("bool", cancelled(request, f"Fleet {name} may not be deleted."))
    finally:
        waits.close()


@task(cache_policy=NO_CACHE, retries=0)
async def adelete_fleet(
    fleet: CreatedFleet, credentials: CredentialsLike = None, *, timeout: float = DELETE_SECONDS
) -> bool:
    """Delete a fleet with its machines: the async twin of ``delete_fleet``.

    Parameters, result and errors are the same.
    """
    name, marker = name_and_marker("fleet", fleet)
    check_seconds(timeout=timeout)
    waits = Waits(task_owner())
    try:
        async with open_async_client(await aload(credentials), retry_budget=timeout) as client:
            found = await client.fleets.delete(
                name, marker=marker, until="deleted", wait_for_runs=True, timeout=timeout, sleep=waits.asleep
            )
            return log_deleted("Fleet", name, found)
    except StopRequested as request:
        return cast("bool", cancelled(request, f"Fleet {name} may not be deleted."))
    finally:
        waits.close()


class dstack_fleet:  # Read as a statement: with dstack_fleet(...)
    """A fleet for the time of a ``with`` or ``async with``, in a flow or a task.

    It is created where the block begins, and deleted where it ends, also by an exception or a cancellation.
    Runs that the block submits use the fleet unless they, or their profile, name ``fleets``; tasks that
    Dask, Ray or a process pool runs have to name it (``fleets: [fleet.name]``). At the end of the block the
    runs that use the fleet, or wait for one of its machines, are waited for. A task that was submitted in the
    block and begins after it fails: wait for tasks inside. If the process dies first, the hooks of this
    package or its reaper delete the fleet.

    Outside of a flow or task it is an error, as nothing could find a fleet that a killed process left. So it
    is in a thread that a flow starts, unless its function runs in ``contextvars.copy_context()``.

    Entering the block returns the ``dstack_core.Fleet``. It raises ``ConfigurationError``,
    ``ResourceNameTakenError``, ``WaitTimeoutError`` if the machines are not ready in time, and the other
    server errors. Leaving it raises no error of a server: what could not be deleted is logged.

    Args:
        configuration: A ``FleetConfiguration``, a dict as in YAML, or the path of a ``type: fleet`` file.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        name: The fleet's name. Default: one made from the flow run, with the configuration's ``name`` in it.
        timeout: Seconds to wait for the machines that the configuration creates at once. Default: 1200.
        delete_timeout: Seconds to wait at the end for the runs that use the fleet. Default: 600.
        retry_budget: Seconds to keep retrying an unreachable server while it is created. Default: 600.

    Example:
        ```python
        from prefect import flow

        from dstack_core import Task
        from prefect_dstack import dstack_fleet, run_task


        @flow
        def prepare_and_train() -> None:
            with dstack_fleet({"nodes": "0..1", "resources": "24GB..", "idle_duration": "15m"}):
                run_task(Task(commands=["python prepare.py"]))
                run_task(Task(commands=["python train.py"]))
        ```
    """

    def __init__(
        self,
        configuration: FleetLike,
        credentials: CredentialsLike = None,
        *,
        name: str | None = None,
        timeout: float = CREATE_SECONDS,
        delete_timeout: float = DELETE_SECONDS,
        retry_budget: float = 600.0,
    ) -> None:
        check_seconds(timeout=timeout, delete_timeout=delete_timeout, retry_budget=retry_budget)
        self._configuration = configuration
        self._credentials = credentials
        self._name = name
        self._timeout = timeout
        self._delete_timeout = delete_timeout
        self._retry_budget = retry_budget
        self._job: FleetJob | None = None
        self._block: DstackCredentials | None = None
        self._token: Token[BlockFleet | None] | None = None

    def __enter__(self) -> Fleet:
        self._block = load(self._credentials)
        job = self._prepare()
        fleet = _create(job, self._block)
        self._token = enter_fleet(job.name)
        return fleet

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _delete(self._leave(), self._block, self._seconds(error))

    async def __aenter__(self) -> Fleet:
        self._block = await aload(self._credentials)
        job = self._prepare()
        fleet = await _acreate(job, self._block)
        self._token = enter_fleet(job.name)
        return fleet

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await _adelete(self._leave(), self._block, self._seconds(error))

    def _prepare(self) -> FleetJob:
        if self._token is not None:
            raise RuntimeError("dstack_fleet: expected one with at a time, got another for the same object")
        self._job = prepare_fleet(
            self._configuration,
            resource_owner("dstack_fleet", f"fleet {described(self._configuration)} {self._name}"),
            name=self._name,
            keep=False,
            timeout=self._timeout,
            retry_budget=self._retry_budget,
        )
        return self._job

    def _leave(self) -> FleetJob:
        job, token = self._job, self._token
        if job is None or token is None:
            raise RuntimeError("dstack_fleet: expected the end of a with that was entered, got another call")
        leave_fleet(token)
        self._token = None
        return job

    def _seconds(self, error: BaseException | None) -> float:
        return BEFORE_THE_KILL_SECONDS if isinstance(error, _INTERRUPTS) else self._delete_timeout


def _create(job: FleetJob, block: DstackCredentials | None) -> Fleet:
    """Create the fleet, and delete it again if something ends that early."""
    try:
        with open_client(block, retry_budget=job.retry_budget) as client:
            return job.create(client)
    except BaseException as error:
        if _is_to_be_deleted(job, error):
            _delete(job, block, BEFORE_THE_KILL_SECONDS)
        raise
    finally:
        job.waits.close()


async def _acreate(job: FleetJob, block: DstackCredentials | None) -> Fleet:
    """Create the fleet: the twin of ``_create``."""
    try:
        async with open_async_client(block, retry_budget=job.retry_budget) as client:
            return await job.acreate(client)
    except BaseException as error:
        if _is_to_be_deleted(job, error):
            await _adelete(job, block, BEFORE_THE_KILL_SECONDS)
        raise
    finally:
        job.waits.close()


def _is_to_be_deleted(job: FleetJob, error: BaseException) -> bool:
    from dstack_core import ConfigurationError, ResourceNameTakenError

    return not job.keep and not isinstance(error, ConfigurationError | ResourceNameTakenError)


def _delete(job: FleetJob, block: DstackCredentials | None, seconds: float) -> None:
    """Delete the fleet; what a server raises is logged."""
    try:
        with open_client(block, retry_budget=seconds) as client:
            client.fleets.delete(job.name, marker=job.marker, wait_for_runs=True, timeout=seconds)
        job.logger.info("Fleet %s is being deleted.", job.name)
    except Exception as error:
        _log_failure(job, error)


async def _adelete(job: FleetJob, block: DstackCredentials | None, seconds: float) -> None:
    """Delete the fleet: the twin of ``_delete``, shielded from the cancellation that led here."""
    with anyio.CancelScope(shield=True):
        try:
            async with open_async_client(block, retry_budget=seconds) as client:
                await client.fleets.delete(job.name, marker=job.marker, wait_for_runs=True, timeout=seconds)
            job.logger.info("Fleet %s is being deleted.", job.name)
        except Exception as error:
            _log_failure(job, error)


def _log_failure(job: FleetJob, error: Exception) -> None:
    job.logger.error("Fleet %s could not be deleted: %s. %s.", job.name, str(error).rstrip("."), LEFT)
