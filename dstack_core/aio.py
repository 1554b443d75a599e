"""The async client: the twin of ``client``, waiting with ``httpx`` (``pip install "dstack-core[async]"``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from dstack_core import _adrive
from dstack_core._base import ClientBase
from dstack_core._operations import Operations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.runs import RunSnapshot
from dstack_core.aio_collections import AsyncBackendCollection, AsyncProjectCollection, AsyncRepoCollection
from dstack_core.aio_run import AsyncRun
from dstack_core.configurations import ConfigurationLike
from dstack_core.models.account import User
from dstack_core.models.events import Event
from dstack_core.models.options import KeywordOptions, SubmitOptions
from dstack_core.models.plan import Plan
from dstack_core.models.profiles import RetryPolicy
from dstack_core.models.resources import Resources
from dstack_core.models.statuses import SpotPolicy
from dstack_core.models.stops import StopResult


class AsyncClient(ClientBase[AsyncTransport]):
    """Talk to one project of one dstack server from one event loop. An async context manager.

    Parameters and errors are those of ``Client``.
    """

    @property
    def runs(self) -> AsyncRunCollection:
        """Return the project's runs."""
        return AsyncRunCollection(self._operations, self._transport)

    @property
    def repos(self) -> AsyncRepoCollection:
        """Return the repository the client was made for."""
        return AsyncRepoCollection(self._operations, self._transport)

    @property
    def projects(self) -> AsyncProjectCollection:
        """Return the server's projects."""
        return AsyncProjectCollection(self._operations, self._transport)

    @property
    def backends(self) -> AsyncBackendCollection:
        """Return the project's backends."""
        return AsyncBackendCollection(self._operations, self._transport)

    async def user(self) -> User:
        """Ask who the token belongs to; neither token nor key is in the answer. Raises the server errors."""
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
    """Submit, find and list the runs of a project: ``client.runs``."""

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
        """Submit exactly one run and return it: the twin of ``RunCollection.submit``.

        Parameters and errors are the same.
        """
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

        Parameters and errors are the same.
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
        """Return the offers a run would have: the twin of ``RunCollection.plan``."""
        # Profiles and configurations are files.
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
        """Return the run with that name, None if there is none: ``RunCollection.get``, async."""
        flow = self._operations.get(run_name, retry_budget=retry_budget, timeout=timeout)
        snapshot = await _adrive.arun(flow, self._transport, sleep, on_event)
        return None if snapshot is None else AsyncRun(self._operations, self._transport, snapshot)

    async def list(self, all: bool = False) -> list[AsyncRun]:
        """Return runs, newest first: the twin of ``RunCollection.list``."""
        snapshots = await _adrive.arun(self._operations.list_runs(all=all), self._transport)
        return [AsyncRun(self._operations, self._transport, snapshot) for snapshot in snapshots]

    async def stop(
        self,
        run_name: str,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> StopResult:
        """Stop the run of that name and return what is known of it: the twin of ``RunCollection.stop``."""
        flow = self._operations.stop_by_name(run_name, abort, until, timeout)
        return await _adrive.arun(flow, self._transport, sleep)

    def _own(self, snapshot: RunSnapshot) -> AsyncRun:
        run = AsyncRun(self._operations, self._transport, snapshot)
        run._is_own = True
        return run
