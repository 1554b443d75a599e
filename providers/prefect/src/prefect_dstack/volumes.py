"""Network volumes for flow runs: the tasks ``create_volume`` and ``delete_volume``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack._cancellation import StopRequested
from prefect_dstack._checks import check_seconds
from prefect_dstack._names import task_owner
from prefect_dstack._owned_fleets import log_deleted, name_and_marker
from prefect_dstack._owned_volumes import (
    DELETE_SECONDS,
    WAIT_SECONDS,
    check_owner,
    prepare_volume,
    volume_info,
)
from prefect_dstack._waits import Waits, cancelled
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core import VolumeLike

CreatedVolume: TypeAlias = str | Mapping[str, Any]
"""The name of a volume, or what ``create_volume`` returned."""


@task(cache_policy=NO_CACHE, retries=0)
def create_volume(
    configuration: VolumeLike,
    credentials: CredentialsLike = None,
    *,
    name: str | None = None,
    keep: bool = False,
    timeout: float = WAIT_SECONDS,
    retry_budget: float = 600.0,
) -> dict[str, Any]:
    """Create a network volume once and wait until runs can mount it.

    Executing the same flow run again finds its volume. A volume holds data, so nothing but ``delete_volume``
    deletes it, whatever ends the flow run; one that could not be created is deleted again. Its owner is in
    its tags, which need dstack 0.19.5.

    Args:
        configuration: A ``VolumeConfiguration``, a dict as in YAML, or the path of a ``type: volume`` file.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        name: The volume's name. Default: one made from the flow run, with the configuration's ``name`` in it.
        keep: Share the volume: it has the ``name`` given here or in the configuration, and every flow with
            ``keep=True`` finds it. Default: False.
        timeout: Seconds to wait until the volume is active. Default: 600.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.

    Returns:
        A dict of JSON-plain values: ``name``, which ``volumes`` of a run takes, ``volume_id``, ``status``,
        ``marker``, ``backend``, ``region`` and ``size`` (bytes).

    Raises:
        ConfigurationError: A value is wrong; nothing was created.
        ResourceNameTakenError: A volume of that name is not this flow run's; nothing was changed.
        ResourceFailedError: The volume could not be created.
        WaitTimeoutError: The volume was not active in time; it may still become so.
        ServerError: The other server errors.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import create_volume, delete_volume, run_task


        @flow
        def train() -> None:
            volume = create_volume({"backend": "aws", "region": "us-east-1", "size": "100GB"})
            mounted = {"volumes": [f"{volume['name']}:/workflow/data"]}
            run_task({"type": "task", "commands": ["python prepare.py"], **mounted})
            run_task({"type": "task", "commands": ["python train.py"], **mounted})
            delete_volume(volume)
        ```
    """
    from dstack_core import ResourceFailedError

    block = load(credentials)
    job = prepare_volume(
        configuration, task_owner(), name=name, keep=keep, timeout=timeout, retry_budget=retry_budget
    )
    try:
        with open_client(block, retry_budget=retry_budget) as client:
            job.waits.check()
            client.volumes.apply(job.configuration, name=job.name, sleep=job.waits.sleep)
            try:
                volume = client.volumes.wait(job.name, timeout=timeout, sleep=job.waits.sleep)
            except ResourceFailedError:
                client.volumes.delete(job.name)
                raise
        return volume_info(volume, job)
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, f"Volume {job.name} is not needed."))
    finally:
        job.waits.close()


@task(cache_policy=NO_CACHE, retries=0)
async def acreate_volume(
    configuration: VolumeLike,
    credentials: CredentialsLike = None,
    *,
    name: str | None = None,
    keep: bool = False,
    timeout: float = WAIT_SECONDS,
    retry_budget: float = 600.0,
) -> dict[str, Any]:
    """Create a network volume once and wait for it: the async twin of ``create_volume``.

    Parameters, result and errors are the same.
    """
    import asyncio

    from dstack_core import ResourceFailedError

    block = await aload(credentials)
    job = prepare_volume(
        configuration, task_owner(), name=name, keep=keep, timeout=timeout, retry_budget=retry_budget
    )
    try:
        async with open_async_client(block, retry_budget=retry_budget) as client:
            await asyncio.to_thread(job.waits.check)
            await client.volumes.apply(job.configuration, name=job.name, sleep=job.waits.asleep)
            try:
                volume = await client.volumes.wait(job.name, timeout=timeout, sleep=job.waits.asleep)
            except ResourceFailedError:
                await client.volumes.delete(job.name)
                raise
        return volume_info(volume, job)
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, f"Volume {job.name} is not needed."))
    finally:
        job.waits.close()


@task(cache_policy=NO_CACHE, retries=0)
def delete_volume(
    volume: CreatedVolume, credentials: CredentialsLike = None, *, timeout: float = DELETE_SECONDS
) -> bool:
    """Delete a network volume with its data.

    Args:
        volume: What ``create_volume`` returned, or the name of a volume. With the former, a volume of another
            owner that has the name by now is left alone.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment.
        timeout: Seconds to wait until it is gone. Default: 600.

    Returns:
        Whether there was such a volume.

    Raises:
        ConfigurationError: A value is wrong.
        ResourceNameTakenError: The volume is of another owner; nothing was deleted.
        RequestRejectedError: Runs still use the volume.
        WaitTimeoutError: It was not deleted in time.
        ServerError: The other server errors.

    Example:
        ``delete_volume("nightly-data")``
    """
    name, marker = name_and_marker("volume", volume)
    check_seconds(timeout=timeout)
    waits = Waits(task_owner())
    try:
        with open_client(load(credentials), retry_budget=timeout) as client:
            if marker is not None:
                check_owner(client.volumes.get(name), marker)
            found = client.volumes.delete(name, until="deleted", timeout=timeout, sleep=waits.sleep)
            return log_deleted("Volume", name, found)
    except StopRequested as request:
        return cast("bool", cancelled(request, f"Volume {name} may not be deleted."))
    finally:
        waits.close()


@task(cache_policy=NO_CACHE, retries=0)
async def adelete_volume(
    volume: CreatedVolume, credentials: CredentialsLike = None, *, timeout: float = DELETE_SECONDS
) -> bool:
    """Delete a network volume with its data: the async twin of ``delete_volume``.

    Parameters, result and errors are the same.
    """
    name, marker = name_and_marker("volume", volume)
    check_seconds(timeout=timeout)
    waits = Waits(task_owner())
    try:
        async with open_async_client(await aload(credentials), retry_budget=timeout) as client:
            if marker is not None:
                check_owner(await client.volumes.get(name), marker)
            found = await client.volumes.delete(name, until="deleted", timeout=timeout, sleep=waits.asleep)
            return log_deleted("Volume", name, found)
    except StopRequested as request:
        return cast("bool", cancelled(request, f"Volume {name} may not be deleted."))
    finally:
        waits.close()
