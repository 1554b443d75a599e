"""What a work pool of type ``dstack`` lets people choose, and the task that is made of it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from prefect.workers.base import BaseJobConfiguration, BaseVariables
from pydantic import Field

from prefect_dstack.credentials import DstackCredentials

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Flow, FlowRun, WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

# What makes sense in the worker's process only.
_NOT_PASSED_ON = ("PREFECT_HOME", "PREFECT_PROFILES_PATH", "PREFECT_SERVER_", "PREFECT_WORKER_")
# The flow's own log records reach Prefect from the machine: its console would repeat them. What the flow
# prints is to come when it is printed.
_DEFAULTS = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PYTHONUNBUFFERED": "1"}
_IMAGE = "What the machine runs in; it must hold Prefect. Without one, Prefect's own image of this version."
_REST = "Further keys of a .dstack.yml, such as fleets, regions, volumes or user."

SpotPolicyName = Literal["spot", "on-demand", "auto"]


class DstackVariables(BaseVariables):
    """Hold what a work pool, deployment or flow run may set about its machine."""

    credentials: DstackCredentials | str | None = Field(
        default=None,
        description="A dstack credentials block, or the name of one; else the worker's environment is used.",
    )
    image: str | None = Field(default=None, description=_IMAGE)
    resources: dict[str, Any] | None = Field(
        default=None, description="What the machine must have, such as {gpu: 24GB.., memory: 32GB..}."
    )
    spot_policy: SpotPolicyName | None = Field(
        default=None, description="Whether spot instances are taken; without it on-demand ones are."
    )
    max_price: float | None = Field(default=None, gt=0, description="The highest price, in USD per hour.")
    max_duration: int | str = Field(
        default="24h", description="When the machine is stopped at the latest: seconds, 2h, or off."
    )
    retry: dict[str, Any] | None = Field(
        default=None, description="When dstack tries again, such as {on_events: [no-capacity], duration: 1h}."
    )
    backends: list[str] | None = Field(default=None, description="The only clouds to take machines from.")
    configuration: dict[str, Any] = Field(default_factory=dict, title="dstack keys", description=_REST)
    stream_output: bool = Field(
        default=True, description="Whether what the machine prints is sent to the flow run's log."
    )
    poll_interval: float = Field(default=5.0, gt=0, description="Seconds between two looks at the machine.")


class DstackJobConfiguration(BaseJobConfiguration):
    """Hold the same for one flow run, with the environment and the command that Prefect adds."""

    credentials: DstackCredentials | str | None = None
    image: str | None = None
    resources: dict[str, Any] | None = None
    spot_policy: SpotPolicyName | None = None
    max_price: float | None = None
    max_duration: int | str = "24h"
    retry: dict[str, Any] | None = None
    backends: list[str] | None = None
    configuration: dict[str, Any] = Field(default_factory=dict)
    stream_output: bool = True
    poll_interval: float = 5.0

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: Flow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Add what the flow run needs; the parameters come from Prefect."""
        chosen = dict(self.env)
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id)
        self.env = {
            name: value
            for name, value in {**_DEFAULTS, **self.env}.items()
            if name in chosen or not name.startswith(_NOT_PASSED_ON)
        }

    def task(self) -> dict[str, Any]:
        """Return the task with the keys of a ``.dstack.yml``.

        A field wins over the same key of ``configuration``. Raises ``ConfigurationError`` for a
        configuration that is no task.
        """
        from dstack_core import ConfigurationError

        kind = self.configuration.get("type", "task")
        if kind != "task":
            raise ConfigurationError(
                f"configuration: a flow run runs in a task, not in a {kind!r}; drop type"
            )
        fields = {
            "image": self.image,
            "resources": self.resources,
            "spot_policy": self.spot_policy,
            "max_price": self.max_price,
            "retry": self.retry,
            "backends": self.backends,
        }
        task = {**self.configuration, **{key: value for key, value in fields.items() if value is not None}}
        task["max_duration"] = self.configuration.get("max_duration", self.max_duration)
        if not {"image", "python", "docker"} & set(task):
            task["image"] = _prefect_image()
        task["env"] = {**_as_mapping(task.get("env")), **self.env}
        return {**task, "type": "task", "commands": [self.command]}

    def check_reach(self, dstack_url: str) -> None:
        """Raise ``ConfigurationError`` when the machine cannot reach the Prefect server.

        An address of this machine alone is fine when the dstack server is here too, which may then run
        jobs here.
        """
        from dstack_core import ConfigurationError

        url = self.env.get("PREFECT_API_URL")
        if not url:
            raise ConfigurationError(
                "PREFECT_API_URL: it is not set, and the machine would find no Prefect server; set it for "
                "the worker"
            )
        if _is_local(url) and not _is_local(dstack_url):
            raise ConfigurationError(
                f"PREFECT_API_URL: {url!r} is an address no other machine can reach; set one that it can in "
                "the work pool's or deployment's env"
            )


def _prefect_image() -> str:
    import sys

    import prefect

    return f"prefecthq/prefect:{prefect.__version__}-python{sys.version_info.major}.{sys.version_info.minor}"


def _as_mapping(env: Any) -> dict[str, Any]:
    if isinstance(env, dict):
        return env
    return dict(str(item).partition("=")[::2] for item in env or [])


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
