"""What each page of the reference shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """Describe one page: its file name, title, opening line and the objects it shows, in order."""

    name: str
    title: str
    intro: str
    objects: tuple[str, ...]


def core(*names: str) -> tuple[str, ...]:
    """Return the paths of public names of ``dstack_core``."""
    return tuple(f"dstack_core.{name}" for name in names)


PAGES = [
    Page(
        "client",
        "Client",
        "Connect to a project. Every method of the async twin takes the same parameters and is awaited.",
        core("Client", "AsyncClient", "SharedAsyncClient"),
    ),
    Page(
        "runs",
        "Runs",
        "Submit, find, follow and stop runs.",
        core("RunCollection", "Run", "AsyncRunCollection", "AsyncRun"),
    ),
    Page(
        "configurations",
        "Configurations",
        "Say what a run does and what it needs.",
        core(
            "Task",
            "Service",
            "Configuration",
            "ConfigurationLike",
            "PortMapping",
            "RegistryAuth",
            "Resources",
            "GPU",
            "RetryPolicy",
            "SpotPolicy",
            "FileMapping",
            "RepoMapping",
            "load_configuration",
            "parse_configuration",
            "Profile",
            "load_profile",
        ),
    ),
    Page(
        "results",
        "Statuses, events and outcomes",
        "Read what a run does and how it ended.",
        core(
            "RunStatus",
            "Outcome",
            "StopResult",
            "StopState",
            "Plan",
            "Offer",
            "Event",
            "StatusChanged",
            "LogLines",
            "ContactLost",
            "ContactRestored",
            "RunFinished",
            "Progress",
            "LogCursor",
            "LogBytes",
            "secret_values",
            "EventRecord",
            "Metric",
        ),
    ),
    Page(
        "integration",
        "Integration",
        "What a workflow engine needs on top of a client: which run is meant, its stop for a task, its log.",
        core(
            "integration.RunRef",
            "integration.stop_run",
            "integration.astop_run",
            "integration.describe_stop",
            "integration.check_ends",
            "integration.LogRelay",
            "integration.RecordLimits",
            "integration.collect_secrets",
            "integration.Masker",
            "integration.mask",
        ),
    ),
    Page(
        "account",
        "Projects, backends, repositories, users",
        "Look around on a server.",
        core(
            "ProjectCollection",
            "Project",
            "ProjectMember",
            "User",
            "BackendCollection",
            "Backend",
            "RepoCollection",
            "AsyncProjectCollection",
            "AsyncBackendCollection",
            "AsyncRepoCollection",
        ),
    ),
    Page(
        "errors",
        "Errors",
        "Everything that is raised on purpose, from the root down. [What to do about them](../errors.md).",
        core(
            "DstackError",
            "ConfigurationError",
            "ProjectNotConfiguredError",
            "PortInUseError",
            "ServerError",
            "ServerUnreachableError",
            "TransientServerError",
            "AuthenticationError",
            "AccessDeniedError",
            "ProjectNotFoundError",
            "RunNotFoundError",
            "RequestRejectedError",
            "RunNameTakenError",
            "RunNotUpdatableError",
            "UnsupportedServerError",
            "ProtocolError",
            "RunError",
            "RunFailedError",
            "NoCapacityError",
            "RunStoppedError",
            "AttachError",
            "WaitTimeoutError",
        ),
    ),
    Page(
        "airflow",
        "Airflow provider",
        "`airflow_provider_dstack`: what a DAG uses. [How to use it](../airflow.md).",
        (
            "airflow_provider_dstack.operators.DstackRunOperator",
            "airflow_provider_dstack.services.DstackServiceOperator",
            "airflow_provider_dstack.services.DstackStopRunOperator",
            "airflow_provider_dstack.reaper.DstackReapOperator",
            "airflow_provider_dstack.sensors.DstackRunSensor",
            "airflow_provider_dstack.decorators.dstack_task",
            "airflow_provider_dstack.hooks.DstackHook",
            "airflow_provider_dstack.triggers.DstackRunTrigger",
            "airflow_provider_dstack.status_trigger.DstackStatusTrigger",
            "airflow_provider_dstack.links.DstackRunLink",
            "airflow_provider_dstack.links.DstackServiceLink",
        ),
    ),
    Page(
        "prefect",
        "Prefect collection",
        "`prefect_dstack`: what a flow uses. [How to use it](../prefect.md).",
        (
            "prefect_dstack.DstackCredentials",
            "prefect_dstack.DstackRun",
            "prefect_dstack.DstackRunHandle",
            "prefect_dstack.adeploy_service",
            "prefect_dstack.aget_run",
            "prefect_dstack.areap_runs",
            "prefect_dstack.flows.arun_and_report",
            "prefect_dstack.arun_task",
            "prefect_dstack.astop_run",
            "prefect_dstack.asubmit_run",
            "prefect_dstack.await_for_run",
            "prefect_dstack.await_for_service",
            "prefect_dstack.deploy_service",
            "prefect_dstack.get_run",
            "prefect_dstack.reap_runs",
            "prefect_dstack.flows.run_and_report",
            "prefect_dstack.run_task",
            "prefect_dstack.stop_dstack_runs",
            "prefect_dstack.stop_run",
            "prefect_dstack.stop_runs_on_cancellation",
            "prefect_dstack.stop_runs_on_crash",
            "prefect_dstack.submit_run",
            "prefect_dstack.wait_for_run",
            "prefect_dstack.wait_for_service",
            "prefect_dstack.worker.DstackWorker",
        ),
    ),
    Page(
        "local", "Embedded server", "[How to use it](../local-server.md).", ("dstack_core.local.LocalServer",)
    ),
]
