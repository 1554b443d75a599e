"""Run GPU work with dstack: the documented Python API as a light, typed client, sync and async."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_core.aio import AsyncClient, AsyncRunCollection
    from dstack_core.aio_collections import (
        AsyncBackendCollection,
        AsyncProjectCollection,
        AsyncRepoCollection,
    )
    from dstack_core.aio_functions import AsyncFunctionCollection, AsyncFunctionRun
    from dstack_core.aio_resource_collections import (
        AsyncFleetCollection,
        AsyncGatewayCollection,
        AsyncSecretCollection,
        AsyncVolumeCollection,
    )
    from dstack_core.aio_run import AsyncRun
    from dstack_core.aio_shared import SharedAsyncClient
    from dstack_core.client import Client, RunCollection
    from dstack_core.collections import BackendCollection, ProjectCollection, RepoCollection
    from dstack_core.configurations import (
        ConfigurationLike,
        FleetLike,
        VolumeLike,
        load_configuration,
        load_fleet,
        load_profile,
        load_volume,
        parse_configuration,
    )
    from dstack_core.errors import (
        AccessDeniedError,
        AttachError,
        AuthenticationError,
        ConfigurationError,
        DstackError,
        PortInUseError,
        ProjectNotConfiguredError,
        ProjectNotFoundError,
        ProtocolError,
        RequestRejectedError,
        ResourceFailedError,
        ResourceNameTakenError,
        RunNameTakenError,
        RunNotFoundError,
        RunNotUpdatableError,
        ServerError,
        ServerUnreachableError,
        TransientServerError,
        UnsupportedServerError,
        WaitTimeoutError,
    )
    from dstack_core.functions import FunctionCollection, FunctionRun
    from dstack_core.models.account import Backend, Gateway, Project, ProjectMember, Secret, User
    from dstack_core.models.callbacks import (
        CallbackEvent,
        CallbacksLike,
        RunCallbacks,
        check_callbacks,
        load_callbacks,
    )
    from dstack_core.models.configurations import Configuration, PortMapping, RegistryAuth, Service, Task
    from dstack_core.models.costs import CostRow
    from dstack_core.models.events import (
        ContactLost,
        ContactRestored,
        Event,
        LogLines,
        PartialLine,
        Reported,
        ReportsDropped,
        RunFinished,
        StatusChanged,
        Waiting,
    )
    from dstack_core.models.files import FileMapping
    from dstack_core.models.fleets import Fleet, FleetConfiguration, FleetPlan, Instance
    from dstack_core.models.functions import FunctionSkipped, RemoteFunctionError, UnusableFunctionError
    from dstack_core.models.options import CommonOptions, KeywordOptions, SubmitOptions, check_options
    from dstack_core.models.outcome import (
        NoCapacityError,
        NoFleetError,
        NoResultError,
        Outcome,
        RunError,
        RunFailedError,
        RunInfrastructureError,
        RunInterruptedError,
        RunLimitError,
        RunStoppedError,
        RunUserError,
    )
    from dstack_core.models.outcome_dict import OutcomeDict
    from dstack_core.models.plan import GpuOffers, Offer, Offers, Plan
    from dstack_core.models.profiles import Profile, RetryPolicy
    from dstack_core.models.progress import LogCursor, Progress, ReportedSoFar
    from dstack_core.models.records import EventRecord, LogBytes, Metric
    from dstack_core.models.reports import ReportLimits
    from dstack_core.models.repos import RepoMapping
    from dstack_core.models.resources import GPU, Resources
    from dstack_core.models.run_attempt import RunAttempt
    from dstack_core.models.secrets import secret_values
    from dstack_core.models.statuses import RunStatus, SpotPolicy
    from dstack_core.models.stops import StopResult, StopState
    from dstack_core.models.survive import Survive
    from dstack_core.models.usage_chart import UsageChart
    from dstack_core.models.utilization import (
        Hardware,
        RunMetrics,
        UsageSeries,
        Utilization,
        UtilizationSoFar,
    )
    from dstack_core.models.volumes import Volume, VolumeConfiguration
    from dstack_core.resource_collections import (
        FleetCollection,
        GatewayCollection,
        SecretCollection,
        VolumeCollection,
    )
    from dstack_core.run import Run

__version__ = "0.1.0"

_HOMES = {
    "aio_resource_collections": (
        "AsyncFleetCollection",
        "AsyncGatewayCollection",
        "AsyncSecretCollection",
        "AsyncVolumeCollection",
    ),
    "resource_collections": ("FleetCollection", "GatewayCollection", "SecretCollection", "VolumeCollection"),
    "models.fleets": ("Fleet", "FleetConfiguration", "FleetPlan", "Instance"),
    "models.volumes": ("Volume", "VolumeConfiguration"),
    "aio": ("AsyncClient", "AsyncRunCollection"),
    "aio_collections": ("AsyncBackendCollection", "AsyncProjectCollection", "AsyncRepoCollection"),
    "aio_functions": ("AsyncFunctionCollection", "AsyncFunctionRun"),
    "aio_run": ("AsyncRun",),
    "aio_shared": ("SharedAsyncClient",),
    "client": ("Client", "RunCollection"),
    "collections": ("BackendCollection", "ProjectCollection", "RepoCollection"),
    "configurations": (
        "FleetLike",
        "VolumeLike",
        "load_fleet",
        "load_volume",
        "ConfigurationLike",
        "load_configuration",
        "load_profile",
        "parse_configuration",
    ),
    "errors": (
        "ResourceFailedError",
        "ResourceNameTakenError",
        "AccessDeniedError",
        "AttachError",
        "AuthenticationError",
        "ConfigurationError",
        "DstackError",
        "PortInUseError",
        "ProjectNotConfiguredError",
        "ProjectNotFoundError",
        "ProtocolError",
        "RequestRejectedError",
        "RunNameTakenError",
        "RunNotFoundError",
        "RunNotUpdatableError",
        "ServerError",
        "ServerUnreachableError",
        "TransientServerError",
        "UnsupportedServerError",
        "WaitTimeoutError",
    ),
    "functions": ("FunctionCollection", "FunctionRun"),
    "models.functions": ("FunctionSkipped", "RemoteFunctionError", "UnusableFunctionError"),
    "models.secrets": ("secret_values",),
    "models.account": ("Gateway", "Secret", "Backend", "Project", "ProjectMember", "User"),
    "models.callbacks": (
        "CallbackEvent",
        "CallbacksLike",
        "RunCallbacks",
        "check_callbacks",
        "load_callbacks",
    ),
    "models.configurations": ("Configuration", "PortMapping", "RegistryAuth", "Service", "Task"),
    "models.events": (
        "ContactLost",
        "ContactRestored",
        "Event",
        "LogLines",
        "PartialLine",
        "Reported",
        "ReportsDropped",
        "RunFinished",
        "StatusChanged",
        "Waiting",
    ),
    "models.files": ("FileMapping",),
    "models.options": ("CommonOptions", "KeywordOptions", "SubmitOptions", "check_options"),
    "models.outcome": (
        "NoCapacityError",
        "NoFleetError",
        "NoResultError",
        "Outcome",
        "OutcomeDict",
        "RunError",
        "RunFailedError",
        "RunInfrastructureError",
        "RunInterruptedError",
        "RunLimitError",
        "RunStoppedError",
        "RunUserError",
    ),
    "models.outcome_dict": ("OutcomeDict",),
    "models.costs": ("CostRow",),
    "models.plan": ("GpuOffers", "Offers", "Offer", "Plan"),
    "models.profiles": ("Profile", "RetryPolicy"),
    "models.run_attempt": ("RunAttempt",),
    "models.survive": ("Survive",),
    "models.progress": ("LogCursor", "Progress", "ReportedSoFar"),
    "models.records": ("EventRecord", "LogBytes", "Metric"),
    "models.reports": ("ReportLimits",),
    "models.repos": ("RepoMapping",),
    "models.resources": ("GPU", "Resources"),
    "models.statuses": ("RunStatus", "SpotPolicy"),
    "models.stops": ("StopResult", "StopState"),
    "models.usage_chart": ("UsageChart",),
    "models.utilization": ("Hardware", "RunMetrics", "UsageSeries", "Utilization", "UtilizationSoFar"),
    "run": ("Run",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "GPU",
    "AccessDeniedError",
    "AsyncBackendCollection",
    "AsyncClient",
    "AsyncFleetCollection",
    "AsyncFunctionCollection",
    "AsyncFunctionRun",
    "AsyncGatewayCollection",
    "AsyncProjectCollection",
    "AsyncRepoCollection",
    "AsyncRun",
    "AsyncRunCollection",
    "AsyncSecretCollection",
    "AsyncVolumeCollection",
    "AttachError",
    "AuthenticationError",
    "Backend",
    "BackendCollection",
    "CallbackEvent",
    "CallbacksLike",
    "Client",
    "CommonOptions",
    "Configuration",
    "ConfigurationError",
    "ConfigurationLike",
    "ContactLost",
    "ContactRestored",
    "CostRow",
    "DstackError",
    "Event",
    "EventRecord",
    "FileMapping",
    "Fleet",
    "FleetCollection",
    "FleetConfiguration",
    "FleetLike",
    "FleetPlan",
    "FunctionCollection",
    "FunctionRun",
    "FunctionSkipped",
    "Gateway",
    "GatewayCollection",
    "GpuOffers",
    "Hardware",
    "Instance",
    "KeywordOptions",
    "LogBytes",
    "LogCursor",
    "LogLines",
    "Metric",
    "NoCapacityError",
    "NoFleetError",
    "NoResultError",
    "Offer",
    "Offers",
    "Outcome",
    "OutcomeDict",
    "PartialLine",
    "Plan",
    "PortInUseError",
    "PortMapping",
    "Profile",
    "Progress",
    "Project",
    "ProjectCollection",
    "ProjectMember",
    "ProjectNotConfiguredError",
    "ProjectNotFoundError",
    "ProtocolError",
    "RegistryAuth",
    "RemoteFunctionError",
    "RepoCollection",
    "RepoMapping",
    "ReportLimits",
    "Reported",
    "ReportedSoFar",
    "ReportsDropped",
    "RequestRejectedError",
    "ResourceFailedError",
    "ResourceNameTakenError",
    "Resources",
    "RetryPolicy",
    "Run",
    "RunAttempt",
    "RunCallbacks",
    "RunCollection",
    "RunError",
    "RunFailedError",
    "RunFinished",
    "RunInfrastructureError",
    "RunInterruptedError",
    "RunLimitError",
    "RunMetrics",
    "RunNameTakenError",
    "RunNotFoundError",
    "RunNotUpdatableError",
    "RunStatus",
    "RunStoppedError",
    "RunUserError",
    "Secret",
    "SecretCollection",
    "ServerError",
    "ServerUnreachableError",
    "Service",
    "SharedAsyncClient",
    "SpotPolicy",
    "StatusChanged",
    "StopResult",
    "StopState",
    "SubmitOptions",
    "Survive",
    "Task",
    "TransientServerError",
    "UnsupportedServerError",
    "UnusableFunctionError",
    "UsageChart",
    "UsageSeries",
    "User",
    "Utilization",
    "UtilizationSoFar",
    "Volume",
    "VolumeCollection",
    "VolumeConfiguration",
    "VolumeLike",
    "WaitTimeoutError",
    "Waiting",
    "__version__",
    "check_callbacks",
    "check_options",
    "load_callbacks",
    "load_configuration",
    "load_fleet",
    "load_profile",
    "load_volume",
    "parse_configuration",
    "secret_values",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package alone costs next to nothing."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
