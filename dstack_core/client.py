"""The sync client: one line a method over the shared flows, which it carries out with ``requests``."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from dstack_core import _drive
from dstack_core._client_base import ClientBase
from dstack_core._operations import Operations
from dstack_core._transport.blocking import BlockingTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.runs import RunSnapshot
from dstack_core.collections import BackendCollection, ProjectCollection, RepoCollection
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
from dstack_core.run import Run

if TYPE_CHECKING:
    from dstack_core.functions import FunctionCollection
    from dstack_core.resource_collections import (
        FleetCollection,
        GatewayCollection,
        SecretCollection,
        VolumeCollection,
    )


class Client(ClientBase[BlockingTransport]):
    """A client of one project of one dstack server; a context manager that several threads can share.

    Making one makes no request. ``Client.from_config`` also reads ``~/.dstack/config.yml`` and takes code.

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

        with Client(server_url="http://localhost:3000", project_name="main", user_token=token) as client:
            run = client.runs.submit("train.dstack.yml")
            print(run.wait().message)
    """

    @property
    def runs(self) -> RunCollection:
        """The project's runs."""
        return RunCollection(self._operations, self._transport)

    @property
    def functions(self) -> FunctionCollection:
        """Functions of Python that are called in runs."""
        # Only a caller of functions pays for the import.
        from dstack_core.functions import FunctionCollection

        return FunctionCollection(self._operations, self._transport)

    @property
    def repos(self) -> RepoCollection:
        """The repository that the client was made for."""
        return RepoCollection(self._operations, self._transport)

    @property
    def projects(self) -> ProjectCollection:
        """The server's projects."""
        return ProjectCollection(self._operations, self._transport)

    @property
    def backends(self) -> BackendCollection:
        """The project's backends."""
        return BackendCollection(self._operations, self._transport)

    @property
    def fleets(self) -> FleetCollection:
        """The project's fleets."""
        # Only a caller of these pays for the import.
        from dstack_core.resource_collections import FleetCollection

        return FleetCollection(self._operations, self._transport)

    @property
    def volumes(self) -> VolumeCollection:
        """The project's network volumes."""
        from dstack_core.resource_collections import VolumeCollection

        return VolumeCollection(self._operations, self._transport)

    @property
    def secrets(self) -> SecretCollection:
        """The project's secrets."""
        from dstack_core.resource_collections import SecretCollection

        return SecretCollection(self._operations, self._transport)

    @property
    def gateways(self) -> GatewayCollection:
        """The project's gateways."""
        from dstack_core.resource_collections import GatewayCollection

        return GatewayCollection(self._operations, self._transport)

    def offers(
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
            ``groups = client.offers("24GB..").by_gpu()``

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
        return _drive.run(flow, self._transport)

    def costs(
        self,
        *,
        by: str | Sequence[str] = "owner",
        since: datetime | str | int | None = None,
        until: datetime | str | int | None = None,
        marker_prefix: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[CostRow]:
        """Return what the project's runs have cost, as the server counts it.

        Replaced and deleted runs count too. A run counts whole, by the time of its submission.

        Args:
            by: How runs are grouped: ``"owner"`` (the DAG of an Airflow task, the kind of other owners),
                ``"dag"``, ``"flow"``, ``"task"``, ``"user"``, ``"gpu"``, ``"day"`` (UTC), ``"name"``,
                ``"status"`` or ``"tag:KEY"``; or several of these. ``"flow"`` and a Prefect ``"task"`` are
                those of the automatic tags, which servers before 0.19.5 do not keep.
            since: Only runs submitted from then on: a ``datetime``, a date such as ``"2026-11-30"`` (UTC), or
                a duration until now such as ``"7d"``. Default: all.
            until: Only runs submitted before then, likewise. Default: all.
            marker_prefix: Only runs whose marker begins so, such as ``"airflow:train/"``. Default: all.
            tags: Only runs that have these tags. Default: all.

        Returns:
            The groups, the most expensive first. Costs are the exact sums of the server's numbers, which have
            four decimals: nothing is rounded here.

        Raises:
            ConfigurationError: An argument is wrong; nothing was sent.
            ProjectNotFoundError: The server has no such project.
            ServerError: The other server errors.

        Example:
            ``print(sum(row.cost for row in client.costs(by="dag", since="30d")))``
        """
        flow = self._operations.costs(by, since, until, marker_prefix, tags)
        return _drive.run(flow, self._transport)

    def user(self) -> User:
        """Return the user whom the token belongs to, without token and keys. Raises the server errors."""
        return _drive.run(self._operations.user(), self._transport)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_transport(self, settings: TransportSettings) -> BlockingTransport:
        return BlockingTransport(settings)


class RunCollection:
    """The runs of a project: ``client.runs`` submits, finds, lists and stops them."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def submit(
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
        sleep: Callable[[float], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[KeywordOptions],
    ) -> Run:
        """Submit exactly one run and return it, even if requests or replies are lost on the way.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            run_name: Default: the configuration's name, else a random one.
            resources: ``Resources``, whose numbers are minimums; or a mapping, or a GPU in its short form
                (``"24GB.."``, ``"A100:40GB:2"``, 1), with the same meaning as in YAML. They replace those of
                the configuration. Default: those of the configuration.
            spot_policy: ``SpotPolicy``, ``"spot"``, ``"on-demand"`` or ``"auto"``. Default: the
                configuration's, else the server's choice.
            retry_policy: A ``RetryPolicy``: whether and how long to wait for capacity; or True, False or a
                mapping, with the same meaning as ``retry`` in YAML. Default: the configuration's.
            max_duration: The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``.
                Default: the configuration's.
            max_price: The highest price, in USD per hour. Default: the configuration's, else no limit.
            working_dir: Where commands start: relative to the code's directory, absolute, or ``~/x``.
                Default: the configuration's, else the code's directory, else the image's own.
            verify_ports: Bind every local port that a task's ``ports`` name and release it again, so that a
                taken one is reported now and not by ``run.attach()``.
            backends: The only backends to take machines from. Default: the configuration's, else all of the
                project's.
            env: Values for the names in the configuration's ``env`` that have none; it also replaces values
                and adds variables. Names that are still without a value get it from the environment of this
                process. Default: none.
            args: The arguments that replace ``${{ run.args }}`` in commands, each quoted for the shell.
                Default: none.
            profile: The name of a profile, or a ``Profile``. Default: the one marked ``default: true``, as
                ``load_profile`` finds it in the ``repo_dir``, else the current directory, and the user's own.
            reports: Whether the run gets ``$DSTACK_RESULT_FILE``, whose content becomes its result, and the
                Python module ``dstack_report`` (servers from 0.19.17 on): a command before those of a task.
                Default: False, the configuration is sent as it is.
            tags: Tags that the run's machine gets at its cloud, by which a bill can be grouped (servers from
                0.19.5 on). A key that the configuration or the profile has keeps its value there. False also
                leaves out the client's ``default_tags``. Default: none of its own.
            debug_on_failure: How long the container is held after the commands of a task have failed, for a
                person who opens a shell in it: seconds or ``"30m"``. For every follower the run has failed at
                once. Default: not at all.
            survive: What the run survives instead of ending: a ``Survive``, a mapping of its fields, or only
                for how long in all, seconds or ``"4h"``. A spot machine that is taken away, and no capacity,
                then begin another attempt of the same run. Not together with ``retry_policy``. Default:
                nothing.
            max_cost: The most that the run may cost in all, in USD: each process that follows the run stops
                it when the server's count reaches it. For the time without a follower, the server gets a
                ``max_duration``: as long as the money lasts at the highest price on offer. Default: no limit.
            marker: Kept with the run. A run of this name that carries it is returned as it is, active or
                finished, instead of submitting; without one, an active run of this name raises
                ``RunNameTakenError`` and a finished one is replaced.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: A function of seconds that replaces ``time.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.

        The code of ``from_config(repo_dir=...)`` and the configuration's ``files`` are packed first and
        uploaded where the server does not have them yet.

        Returns:
            The run.

        Raises:
            ConfigurationError: Something is wrong or missing; nothing was submitted. For a taken port it is
                ``PortInUseError``.
            RunNameTakenError: An active run has that name, and it is not the one that ``marker`` names.
            ServerError: The other server errors.

        Example:
            ``client.runs.submit("train.dstack.yml", env={"HF_TOKEN": token}, args=["--epochs", "3"])``

        Source: the documented API, "submit()"; PROTOCOL 1.3, 1.4.
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
        flow = self._operations.submit(
            configuration,
            run_name,
            given,
            verify_ports=verify_ports,
            marker=marker,
            retry_budget=retry_budget,
        )
        return self._own(_drive.run(flow, self._transport, sleep, on_event))

    def apply(
        self,
        configuration: ConfigurationLike,
        run_name: str | None = None,
        *,
        verify_ports: bool = True,
        marker: str | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Run:
        """Submit a run, or update the active one of that name in place, as ``dstack apply`` does.

        If no run of that name is active, one is submitted. An active run that already matches is left
        alone. Of a service nearly everything can be updated; the server replaces its replicas one after the
        other while it keeps answering. Nothing is submitted or updated twice, even if requests or replies are
        lost on the way.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            run_name: Which run it is. Default: the configuration's name, else a random one.
            verify_ports: Bind every local port that a task's ``ports`` name and release it again, so that a
                taken one is reported now and not by ``run.attach()``.
            marker: Kept with the run. A finished run of this name that carries it is returned as it is.
                Without one an updated run keeps the marker that it has.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: A function of seconds that replaces ``time.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.
            **options: The options of ``submit``, by keyword; ``SubmitOptions`` explains each.

        Returns:
            The run; ``deployment_num`` counts its updates. ``wait_until_ready()`` waits until the replicas
            from before the update are gone.

        Raises:
            RunNotUpdatableError: The run is active, and a change needs a new run, or it is stopping; nothing
                was changed. Its ``changes`` names the keys that need a new run.
            ConfigurationError: Something is wrong or missing; nothing was submitted or updated.
            ServerError: The other server errors.

        Example:
            ``run = client.runs.apply("service.dstack.yml", run_name="llm")``

        Source: PROTOCOL 1.4.
        """
        flow = self._operations.submit(
            configuration,
            run_name,
            options,
            verify_ports=verify_ports,
            marker=marker,
            retry_budget=retry_budget,
            in_place=True,
        )
        return self._own(_drive.run(flow, self._transport, sleep, on_event))

    def plan(
        self,
        configuration: ConfigurationLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Plan:
        """Return the offers that a run would have; nothing is submitted.

        Args:
            configuration: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``.
            timeout: Time limit of everything in seconds, retries included. None: retry for the client's
                budget.
            **options: The options of ``submit``, by keyword; ``SubmitOptions`` explains each.

        Returns:
            The plan. If no machine is on offer, its ``offers`` are empty; that raises nothing.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            ConfigurationError: Something is wrong or missing.
            ServerError: The server errors.

        Example:
            ``print(client.runs.plan("train.dstack.yml").max_price_per_hour)``

        Source: PROTOCOL 1.4.
        """
        flow = self._operations.plan(configuration, options, timeout=timeout)
        return _drive.run(flow, self._transport)

    def get(
        self,
        run_name: str,
        *,
        timeout: float | None = None,
        retry_budget: float | None = None,
        sleep: Callable[[float], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Run | None:
        """Return the run of that name, or None if there is no such run.

        Args:
            run_name: The run's name.
            timeout: Time limit of everything in seconds, retries included. None: no limit but the budget.
            retry_budget: Seconds to retry an unreachable server; None: the client's.
            sleep: A function of seconds that replaces ``time.sleep`` between two tries.
            on_event: Gets ``ContactLost`` and ``ContactRestored`` instead of the ``dstack_core`` logger.

        Returns:
            The run, active or finished, or None.

        Raises:
            WaitTimeoutError: ``timeout`` passed.
            ServerError: The server errors.

        Example:
            ``run = client.runs.get("train")``
        """
        flow = self._operations.get(run_name, retry_budget=retry_budget, timeout=timeout)
        snapshot = _drive.run(flow, self._transport, sleep, on_event)
        return None if snapshot is None else Run(self._operations, self._transport, snapshot)

    def list(
        self,
        all: bool = False,
        *,
        limit: int | None = None,
        status: RunStatus | str | Collection[str] | None = None,
        marker_prefix: str | None = None,
    ) -> builtins.list[Run]:
        """Return runs, newest first: the active ones, or the latest finished run if none is active.

        With ``status`` or ``marker_prefix`` and without ``all`` only active runs are looked through.

        Args:
            all: Return every run of the project, active and finished.
            limit: The most runs to return; no more pages are read than they need. Default: no limit.
            status: Only runs with that status, or one of these. Default: any.
            marker_prefix: Only runs with a marker that begins so. Default: any.

        Returns:
            The runs.

        Raises:
            ConfigurationError: An argument is wrong.
            ProjectNotFoundError: The server has no such project; asked only if there are no runs.
            ServerError: The other server errors.

        Example:
            ``names = [run.name for run in client.runs.list(all=True, limit=20)]``

        Source: the documented API, "list()"; PROTOCOL 1.7, 3.1.
        """
        flow = self._operations.list_runs(all=all, limit=limit, status=status, marker_prefix=marker_prefix)
        snapshots = _drive.run(flow, self._transport)
        return [Run(self._operations, self._transport, snapshot) for snapshot in snapshots]

    def delete(self, run_name: str) -> None:
        """Delete a run that has ended from the server's list; its log is kept. A missing one raises nothing.

        Args:
            run_name: The run's name.

        Raises:
            RequestRejectedError: The run is active: stop it first.
            ServerError: The other server errors.

        Example:
            ``client.runs.delete("train")``

        Source: PROTOCOL 1.7.
        """
        _drive.run(self._operations.delete_run(run_name), self._transport)

    def stop(
        self,
        run_name: str,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> StopResult:
        """Stop the run of that name and return what is known of it.

        The stop is the first request, so it reaches whichever run has the name. A missing or finished run
        raises nothing.

        Args:
            run_name: The run's name.
            abort: Kill the processes without a grace period.
            until: Return once the server has accepted the stop, shows the run stopping, or shows its end.
            timeout: Time limit of the whole stop in seconds, requests included. None retries an unreachable
                server for the client's retry budget and waits for the end without a limit.
            sleep: A function of seconds, instead of ``time.sleep``.

        Returns:
            The result; its ``state`` is ``MISSING`` if there is no such run.

        Raises:
            ServerUnreachableError: The server accepted no stop in time; the run may still be running.
            WaitTimeoutError: The run did not reach ``until`` within ``timeout``.
            ServerError: Any other refusal, such as ``AccessDeniedError``.

        Example:
            ``client.runs.stop("train", until="ended", timeout=60)``

        Source: the documented API, "stop()"; PROTOCOL 1.7.
        """
        flow = self._operations.stop_by_name(run_name, abort, until, timeout)
        return _drive.run(flow, self._transport, sleep)

    def _own(self, snapshot: RunSnapshot) -> Run:
        run = Run(self._operations, self._transport, snapshot)
        run._is_own = True
        return run
