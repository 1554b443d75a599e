"""The async collections of fleets, volumes, secrets and gateways: the twin of ``resource_collections``."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from dstack_core import _adrive
from dstack_core._operations import Operations
from dstack_core._resource_operations import ResourceOperations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core.configurations import FleetLike, VolumeLike
from dstack_core.models.account import Gateway, Secret
from dstack_core.models.fleets import Fleet, FleetPlan
from dstack_core.models.volumes import Volume


class _AsyncCollection:
    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = ResourceOperations(operations)
        self._transport = transport


class AsyncFleetCollection(_AsyncCollection):
    """The fleets of a project: ``client.fleets``."""

    async def plan(self, configuration: FleetLike) -> FleetPlan:
        """Return what ``apply`` would do, and the machines on offer; nothing is changed.

        Args:
            configuration: A ``FleetConfiguration``, a dict as in YAML, or the path of a ``type: fleet`` file.

        Returns:
            The plan. If no machine is on offer, its ``offers`` are empty; that raises nothing.

        Raises:
            ConfigurationError: Something is wrong or missing.
            ServerError: The server errors.

        Example:
            ``print((await client.fleets.plan("fleet.dstack.yml")).max_price_per_hour)``
        """
        flow = await asyncio.to_thread(self._operations.plan_fleet, configuration)
        return await _adrive.arun(flow, self._transport)

    async def apply(
        self,
        configuration: FleetLike,
        *,
        name: str | None = None,
        marker: str | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> Fleet:
        """Create exactly one fleet of that name, or update it in place, even if replies are lost on the way.

        A fleet that already matches is left alone. Servers from 0.19.6 on can change a fleet in place; which
        keys, is the server's to decide. A fleet of that name that is being deleted is waited for.

        Args:
            configuration: A ``FleetConfiguration``, a dict as in YAML, or the path of a ``type: fleet`` file.
            name: The fleet's name. Default: the configuration's.
            marker: Kept with the fleet. With one, a fleet of that name that carries another marker, or none,
                is never changed. Without one, any fleet of that name is updated, as ``dstack apply`` does.
            retry_budget: Seconds to retry an unreachable server, and to wait for a fleet that is being
                deleted; None: the client's.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            The fleet; its machines may still be on their way: ``wait``.

        Raises:
            ResourceNameTakenError: The fleet of that name is not the caller's; nothing was changed.
            ConfigurationError: Something is wrong or missing; nothing was sent.
            ServerError: The other server errors.

        Example:
            ``fleet = await client.fleets.apply({"name": "train", "nodes": "0..2", "resources": "24GB"})``

        Source: PROTOCOL 1.2.
        """
        flow = await asyncio.to_thread(
            self._operations.apply_fleet, configuration, name=name, marker=marker, retry_budget=retry_budget
        )
        return await _adrive.arun(flow, self._transport, sleep)

    async def get(self, name: str) -> Fleet | None:
        """Return the fleet of that name, or None if there is no such fleet. Raises the server errors."""
        return await _adrive.arun(self._operations.get_fleet(name), self._transport)

    async def list(self) -> builtins.list[Fleet]:
        """Return the project's fleets. Raises the server errors."""
        return await _adrive.arun(self._operations.list_fleets(), self._transport)

    async def wait(
        self,
        name: str,
        machines: int = 1,
        *,
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> Fleet | None:
        """Wait until so many machines of a fleet are ready for runs, idle or busy.

        Args:
            name: The fleet's name.
            machines: How many machines.
            timeout: Time limit in seconds. None: no limit.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            The fleet, also one that is no longer active; None if there is no such fleet.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            ServerError: The server errors.

        Example:
            ``await client.fleets.wait("train", machines=2, timeout=900)``
        """
        return await _adrive.arun(
            self._operations.wait_for_fleet(name, machines, timeout), self._transport, sleep
        )

    async def delete(
        self,
        name: str,
        *,
        instances: Sequence[int] | None = None,
        marker: str | None = None,
        until: Literal["accepted", "deleted"] = "accepted",
        wait_for_runs: bool = False,
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> bool:
        """Delete a fleet with its machines, or single machines of it. A missing one raises nothing.

        Args:
            name: The fleet's name.
            instances: The numbers of the machines to delete. Default: the whole fleet.
            marker: With one, a fleet that carries another marker is left alone.
            until: Return once the server has accepted the request, or once the machines are gone.
            wait_for_runs: If runs use it, or wait for one of its machines, wait for their ends. Default:
                False, a fleet in use is refused.
            timeout: Time limit in seconds. None: retry an unreachable server for the client's budget, and
                wait for the end without a limit.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            Whether there was such a fleet.

        Raises:
            ResourceNameTakenError: The fleet carries another marker; nothing was deleted.
            WaitTimeoutError: ``timeout`` passed.
            RequestRejectedError: The server refused, such as for a fleet that runs use.
            ServerError: The other server errors.

        Example:
            ``await client.fleets.delete("train", until="deleted", timeout=600)``
        """
        flow = self._operations.delete_fleet(
            name,
            instances=instances,
            marker=marker,
            until=until,
            timeout=timeout,
            wait_for_runs=wait_for_runs,
        )
        return await _adrive.arun(flow, self._transport, sleep)


class AsyncVolumeCollection(_AsyncCollection):
    """The network volumes of a project: ``client.volumes``."""

    async def apply(
        self,
        configuration: VolumeLike,
        *,
        name: str | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> Volume:
        """Create exactly one volume of that name, or return the one that exists.

        A volume is never changed. One that exists in another place, or with other tags, is not the caller's.

        Args:
            configuration: A ``VolumeConfiguration``, a dict as in YAML, or the path of a ``type: volume``
                file.
            name: The volume's name. Default: the configuration's.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            The volume, which may still be on its way: ``wait``.

        Raises:
            ResourceNameTakenError: The volume of that name is another one; nothing was changed.
            ConfigurationError: Something is wrong or missing; nothing was sent.
            ServerError: The other server errors.

        Example:
            ``await client.volumes.apply("data.volume.yml")``

        Source: PROTOCOL 1.2.
        """
        flow = await asyncio.to_thread(
            self._operations.apply_volume, configuration, name=name, retry_budget=retry_budget
        )
        return await _adrive.arun(flow, self._transport, sleep)

    async def get(self, name: str) -> Volume | None:
        """Return the volume of that name, or None if there is no such volume. Raises the server errors."""
        return await _adrive.arun(self._operations.get_volume(name), self._transport)

    async def list(self) -> builtins.list[Volume]:
        """Return the project's volumes. Raises the server errors."""
        return await _adrive.arun(self._operations.list_volumes(), self._transport)

    async def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> Volume:
        """Wait until runs can mount a volume.

        Args:
            name: The volume's name.
            timeout: Time limit in seconds. None: no limit.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            The volume.

        Raises:
            ResourceFailedError: It could not be created, or it is gone.
            WaitTimeoutError: ``timeout`` passed.
            ServerError: The server errors.

        Example:
            ``await client.volumes.wait("data", timeout=300)``
        """
        return await _adrive.arun(self._operations.wait_for_volume(name, timeout), self._transport, sleep)

    async def delete(
        self,
        name: str,
        *,
        until: Literal["accepted", "deleted"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> bool:
        """Delete a volume with its data. A missing one raises nothing.

        Args:
            name: The volume's name.
            until: Return once the server has accepted the request, or once the volume is gone.
            timeout: Time limit in seconds. None: retry an unreachable server for the client's budget, and
                wait for the end without a limit.
            sleep: An async function of seconds that replaces ``asyncio.sleep``.

        Returns:
            Whether there was such a volume.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            RequestRejectedError: The server refused, such as for a volume that runs use.
            ServerError: The other server errors.

        Example:
            ``await client.volumes.delete("data", until="deleted", timeout=300)``
        """
        flow = self._operations.delete_volume(name, until=until, timeout=timeout)
        return await _adrive.arun(flow, self._transport, sleep)


class AsyncSecretCollection(_AsyncCollection):
    """The secrets of a project, on servers from 0.19.17 on: ``client.secrets``.

    No value is ever read back.
    """

    async def set(self, name: str, value: str) -> Secret:
        """Create a secret or replace its value.

        Args:
            name: The name that ``${{ secrets.NAME }}`` of a configuration takes.
            value: The value; it is sent to the server and kept nowhere else.

        Returns:
            The secret without its value.

        Raises:
            ConfigurationError: The name or the value is wrong; nothing was sent.
            UnsupportedServerError: The server is older than 0.19.17.
            ServerError: The other server errors.

        Example:
            ``await client.secrets.set("hf_token", os.environ["HF_TOKEN"])``

        Source: PROTOCOL 1.2.
        """
        return await _adrive.arun(self._operations.set_secret(name, value), self._transport)

    async def list(self) -> builtins.list[Secret]:
        """Return the project's secrets without their values. Raises the server errors."""
        return await _adrive.arun(self._operations.list_secrets(), self._transport)

    async def delete(self, name: str) -> bool:
        """Delete a secret, and return whether there was one. Raises the server errors."""
        return await _adrive.arun(self._operations.delete_secret(name), self._transport)


class AsyncGatewayCollection(_AsyncCollection):
    """The gateways of a project: ``client.gateways``."""

    async def list(self) -> builtins.list[Gateway]:
        """Return the project's gateways. Raises the server errors."""
        return await _adrive.arun(self._operations.list_gateways(), self._transport)

    async def get(self, name: str) -> Gateway | None:
        """Return the gateway of that name, or None if there is no such gateway. Raises the server errors."""
        return await _adrive.arun(self._operations.get_gateway(name), self._transport)
