"""The async client: the twin of ``client``, with ``httpx`` (``pip install "dstack-core[async]"``).

Configurations, profiles and code are files, and packing code runs git. Reading them blocks, so it happens in
a thread; the flow it returns then runs on the event loop.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from dstack_core import _adrive
from dstack_core._client_base import ClientBase
from dstack_core._operations import Operations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.runs import RunSnapshot
from dstack_core.aio_collections import AsyncBackendCollection, AsyncProjectCollection, AsyncRepoCollection
from dstack_core.aio_run import AsyncRun
from dstack_core.configurations import ConfigurationLike
from dstack_core.models.account import User
from dstack_core.models.costs import CostRow
from dstack_core.models.events import Event
from dstack_core.models.options import KeywordOptions, SubmitOptions
from dstack_core.models.plan import Offers, Plan
from dstack_core.models.profiles import RetryPolicy
from dstack_core.models.resources import Resources
from dstack_core.models.statuses import RunStatus, SpotPolicy
from dstack_core.models.stops import StopResult

if TYPE_CHECKING:
    from dstack_core.aio_functions import AsyncFunctionCollection
    from dstack_core.aio_resource_collections import (
        AsyncFleetCollection,
        AsyncGatewayCollection,
        AsyncSecretCollection,
        AsyncVolumeCollection,
    )


class AsyncClient(ClientBase[AsyncTransport]):
    """A client of one project of one dstack server in one event loop; an async context manager.

    Args:
        server_url: The server's address, such as ``http://localhost:3000``. Default: ``DSTACK_SERVER_URL``.
        project_name: Default: ``DSTACK_PROJECT``.
        user_token: The token of a user of the server. Default: ``DSTACK_TOKEN``.
        timeout: Seconds to wait for each part of a reply.
        connect_timeout: Seconds to wait for each connection.
        retry_budget: Seconds for which one call keeps retrying an unreachable server.
        verify: Whether to check TLS certificates, or the path of a CA bundle.
        ui_url: The server's address for browsers, in every address of a page. Default: ``DSTACK_UI_URL``
            unless ``server_url`` is given, else the server's address.
        default_tags: Tags of the machines of every run, as ``tags`` of ``submit``, which wins. A server
            before 0.19.5 gets none of them. Default: none.

    Raises:
        ProjectNotConfiguredError: The server, the project or the token is missing.
        ConfigurationError: An argument is wrong.

    Example::

        async with AsyncClient.from_config() as client:
            run = await client.runs.submit("train.dstack.yml")
            print((await run.wait()).message)
    """

    @property
    def runs(self) -> AsyncRunCollection:
        """The project's runs."""
        return AsyncRunCollection(self._operations, self._transport)

    @property
    def functions(self) -> AsyncFunctionCollection:
        """Functions of Python that are called in runs."""
        # Only a caller of functions pays for the import.
        from dstack_core.aio_functions import AsyncFunctionCollection

        return AsyncFunctionCollection(self._operations, self._transport)

    @property
    def repos(self) -> AsyncRepoCollection:
        """The repository that the client was made for."""
        return AsyncRepoCollection(self._operations, self._transport)

    @property
    def projects(self) -> AsyncProjectCollection:
        """The server's projects."""
        return AsyncProjectCollection(self._operations, self._transport)

    @property
    def backends(self) -> AsyncBackendCollection:
        """The project's backends."""
        return AsyncBackendCollection(self._operations, self._transport)

    @property
    def fleets(self) -> AsyncFleetCollection:
        """The project's fleets."""
        # Only a caller of these pays for the import.
        from dstack_core.aio_resource_collections import AsyncFleetCollection

        return AsyncFleetCollection(self._operations, self._transport)

    @property
    def volumes(self) -> AsyncVolumeCollection:
        """The project's network volumes."""
        from dstack_core.aio_resource_collections import AsyncVolumeCollection

        return AsyncVolumeCollection(self._operations, self._transport)

    @property
    def secrets(self) -> AsyncSecretCollection:
        """The project's secrets."""
        from dstack_core.aio_resource_collections import AsyncSecretCollection

        return AsyncSecretCollection(self._operations, self._transport)

    @property
    def gateways(self) -> AsyncGatewayCollection:
        """The project's gateways."""
        from dstack_core.aio_resource_collections import AsyncGatewayCollection

        return AsyncGatewayCollection(self._operations, self._transport)

    async def offers(
        self,
        resources: Resources | Mapping[str, Any] | str | int | None = None,
        *,
        backends: Sequence[str] | None = None,
        regions: Sequence[str] | None = None,
        instance_types: Sequence[str] | None = None,
        fleets: Sequence[str] | None = None,
        spot_policy: SpotPolicy | str = "auto",
        max_price: float | None = None,
        limit: int = 100,
    ) -> Offers:
        """Return the machines that the project could get now; nothing is submitted.

        Args:
            resources: ``Resources``, whose numbers are minimums; or a mapping, or a GPU in its short form
                (``"24GB.."``, ``"A100:40GB:2"``, 1), with the same meaning as in YAML. Default: any machine.
            backends: Only machines of these backends. Default: all of the project's.
            regions: Only machines of these regions. Default: all.
            instance_types: The only types of machines, in the cloud's words. Default: all.
            fleets: Only machines of these fleets. Default: fleets are ignored, from 0.20 on too.
            spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"`` for both.
            max_price: The highest price of a machine, in USD per hour. Default: no limit.
            limit: The most offers to return.

        Returns:
            The offers, the cheapest first; ``by_gpu()`` groups them.

        Raises:
            ConfigurationError: An argument is wrong; nothing was sent.
            ServerError: The server errors.

        Example:
            ``groups = (await client.offers("24GB..")).by_gpu()``

        Source: PROTOCOL 1.4.
        """
        # Only a caller of these pays for the import.
        from dstack_core._resource_operations import ResourceOperations

        flow = ResourceOperations(self._operations).offers(
            {
                "resources": resources,
                "backends": backends,
                "regions": regions,
                "instance_types": instance_types,
                "fleets": fleets,
                "spot_policy": spot_policy,
                "max_price": max_price,
            },
            limit,
        )
        return await _adrive.arun(flow, self._transport)

    async def costs(
        self,
        *,
        by: str | Sequence[str] = "owner",
        since: datetime | str | int | None = None,
        until: datetime | str | int | None = None,
        marker_prefix: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[CostRow]:
        """Return what the project's runs have cost: the twin of ``Client.costs``, which has the details.

        Args:
            by: How runs are grouped: ``"owner"``, ``"dag"``, ``"flow"``, ``"task"``, ``"user"``, ``"gpu"``,
                ``"day"``, ``"name"``, ``"status"`` or ``"tag:KEY"``; or several of these.
            since: Only runs submitted from then on: a ``datetime``, a date, or a duration until now.
            until: Only runs submitted before then, likewise.
            marker_prefix: Only runs whose marker begins so.
            tags: Only runs that have these tags.

        Returns:
            The groups, the most expensive first; costs are exact sums.

        Raises:
            ConfigurationError: An argument is wrong; nothing was sent.
            ServerError: The server errors.
        """
        flow = self._operations.costs(by, since, until, marker_prefix, tags)
        return await _adrive.arun(flow, self._transport)

    async def user(self) -> User:
        """Return the user whom the token belongs to, without token and keys. Raises the server errors."""
        return await _adrive.arun(self._operations.user(), self._transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _new_transport(self, settings: TransportSettings) -> AsyncTransport:
        return AsyncTransport(settings)


class AsyncRunCollection:
    """The runs of a project: ``client.runs`` submits, finds, lists and stops them."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def submit(
        self,
        configuration: ConfigurationLike,
        run_name: str | None = None,
        resources: Resources | Mapping[str, Any] | str | int | None = None,
        spot_policy: SpotPolicy | str | None = None,
        retry_policy: RetryPolicy | Mapping[str, Any] | bool | None = None,
        max_duration: int | str | None = None,
        max_price: float | None = None,
        working_dir: str | None = None,
        verify_ports: bool = True,
        backends: list[str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        marker: str | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[KeywordOptions],
    ) -> AsyncRun:
        """Submit exactly one run and return it: the twin of ``RunCollection.submit``, which has the details.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            run_name: Default: the configuration's name, else a random one.
            resources: ``Resources``, a mapping or a GPU in its short form; replaces the configuration's.
            spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``.
            retry_policy: A ``RetryPolicy``, True, False or a mapping: whether to wait for capacity.
            max_duration: The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``.
            max_price: The highest price, in USD per hour.
            working_dir: Where commands start.
            verify_ports: Report a local port that is taken now.
            backends: The only backends to take machines from.
            env: Values for the names of the configuration's ``env``, and more variables.
            marker: Kept with the run; a run of this name that carries it is returned instead of submitting.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: An async function of seconds that replaces ``asyncio.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.
            **options: ``args`` and ``profile``; ``KeywordOptions`` explains them.

        Returns:
            The run.

        Raises:
            ConfigurationError: Something is wrong or missing; nothing was submitted.
            ServerError: The server errors.

        Example:
            ``run = await client.runs.submit("train.dstack.yml", max_price=2.5)``
        """
        # The documented API has these as parameters, which may be passed by position; the others are
        # keywords.
        given: SubmitOptions = {
            "resources": resources,
            "spot_policy": spot_policy,
            "retry_policy": retry_policy,
            "max_duration": max_duration,
            "max_price": max_price,
            "working_dir": working_dir,
            "backends": backends,
            "env": env,
            **options,
        }
        flow = await asyncio.to_thread(
            self._operations.submit,
            configuration,
            run_name,
            given,
            verify_ports=verify_ports,
            marker=marker,
            retry_budget=retry_budget,
        )
        return self._own(await _adrive.arun(flow, self._transport, sleep, on_event))

    async def apply(
        self,
        configuration: ConfigurationLike,
        run_name: str | None = None,
        *,
        verify_ports: bool = True,
        marker: str | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncRun:
        """Submit a run, or update the active one of that name in place: the twin of ``RunCollection.apply``.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            run_name: Which run it is. Default: the configuration's name, else a random one.
            verify_ports: Report a local port that is taken now.
            marker: Kept with the run; a finished run of this name that carries it is returned as it is.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: An async function of seconds that replaces ``asyncio.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.
            **options: The options of ``submit``, by keyword; ``SubmitOptions`` explains each.

        Returns:
            The run; ``deployment_num`` counts its updates.

        Raises:
            RunNotUpdatableError: The run is active, and a change needs a new run; nothing was changed.
            ConfigurationError: Something is wrong or missing; nothing was submitted or updated.
            ServerError: The other server errors.
        """
        flow = await asyncio.to_thread(
            self._operations.submit,
            configuration,
            run_name,
            options,
            verify_ports=verify_ports,
            marker=marker,
            retry_budget=retry_budget,
            in_place=True,
        )
        return self._own(await _adrive.arun(flow, self._transport, sleep, on_event))

    async def plan(
        self,
        configuration: ConfigurationLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Plan:
        """Return the offers that a run would have; nothing is submitted: the twin of ``RunCollection.plan``.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            timeout: Time limit of everything in seconds. None: retry for the client's budget.
            **options: The options of ``submit``, by keyword; ``SubmitOptions`` explains each.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            ConfigurationError: Something is wrong or missing.
            ServerError: The server errors.
        """
        flow = await asyncio.to_thread(self._operations.plan, configuration, options, timeout=timeout)
        return await _adrive.arun(flow, self._transport)

    async def get(
        self,
        run_name: str,
        *,
        timeout: float | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> AsyncRun | None:
        """Return the run of that name, or None if there is no such run: the twin of ``RunCollection.get``.

        Args:
            run_name: The run's name.
            timeout: Time limit of everything in seconds, retries included. None: no limit but the budget.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: An async function of seconds that replaces ``asyncio.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            ServerError: The server errors.
        """
        flow = self._operations.get(run_name, retry_budget=retry_budget, timeout=timeout)
        snapshot = await _adrive.arun(flow, self._transport, sleep, on_event)
        return None if snapshot is None else AsyncRun(self._operations, self._transport, snapshot)

    async def list(
        self,
        all: bool = False,
        *,
        limit: int | None = None,
        status: RunStatus | str | Collection[str] | None = None,
        marker_prefix: str | None = None,
    ) -> builtins.list[AsyncRun]:
        """Return runs, newest first: the twin of ``RunCollection.list``.

        Args:
            all: Return every run of the project, active and finished.
            limit: The most runs to return; no more pages are read than they need. Default: no limit.
            status: Only runs with that status, or one of these. Default: any.
            marker_prefix: Only runs with a marker that begins so. Default: any.

        Raises:
            ConfigurationError: An argument is wrong.
            ServerError: The server errors.
        """
        flow = self._operations.list_runs(all=all, limit=limit, status=status, marker_prefix=marker_prefix)
        snapshots = await _adrive.arun(flow, self._transport)
        return [AsyncRun(self._operations, self._transport, snapshot) for snapshot in snapshots]

    async def delete(self, run_name: str) -> None:
        """Delete a run that has ended from the server's list: the twin of ``RunCollection.delete``.

        Raises ``RequestRejectedError`` for an active run, and the other server errors.
        """
        await _adrive.arun(self._operations.delete_run(run_name), self._transport)

    async def stop(
        self,
        run_name: str,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> StopResult:
        """Stop the run of that name and return what is known of it: the twin of ``RunCollection.stop``.

        Args:
            run_name: The run's name.
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None: the client's retry
                budget, and no limit for the end.
            sleep: An async function of seconds, instead of ``asyncio.sleep``.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.
        """
        flow = self._operations.stop_by_name(run_name, abort, until, timeout)
        return await _adrive.arun(flow, self._transport, sleep)

    def _own(self, snapshot: RunSnapshot) -> AsyncRun:
        run = AsyncRun(self._operations, self._transport, snapshot)
        run._is_own = True
        return run
