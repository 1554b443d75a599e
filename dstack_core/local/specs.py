"""Run specifications as the server of 0.22.5 accepts and stores them (PROTOCOL 1.3, 1.4, 3.2)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dstack_core.local.quantities import IdleSeconds, IntRange, ResourcesSpec, Strict
from dstack_core.local.spec_parts import (
    EntityReference,
    FileArchiveMapping,
    FilePathMapping,
    PortMapping,
    Profile,
    ProfileParams,
    Python,
    RegistryAuth,
    read_env,
    read_file_mapping,
    read_port,
    read_service_port,
)


class Configuration(ProfileParams):
    """Hold the keys that tasks, services and dev environments share."""

    name: str | None = None
    image: str | None = None
    user: str | None = None
    privileged: bool = False
    entrypoint: str | None = None
    working_dir: str | None = None
    home_dir: str = "/root"
    registry_auth: RegistryAuth | None = None
    python: Python | None = None
    nvcc: bool | None = None
    single_branch: bool | None = None
    env: Annotated[dict[str, str], BeforeValidator(read_env)] = Field(default_factory=dict)
    shell: str | None = None
    resources: ResourcesSpec = ResourcesSpec()
    priority: Annotated[int, Field(ge=0, le=100)] | None = None
    volumes: list[dict[str, Any] | str] = Field(default_factory=list)
    docker: bool | None = None
    repos: list[dict[str, Any] | str] = Field(default_factory=list)
    files: list[Annotated[FilePathMapping, BeforeValidator(read_file_mapping)]] = Field(default_factory=list)
    dstack: bool = False
    setup: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _exclusive(self) -> Configuration:
        if self.python is not None and self.image is not None:
            raise ValueError("`image` and `python` are mutually exclusive fields")
        return self


class TaskConfiguration(Configuration):
    """Hold a task."""

    type: Literal["task"] = "task"
    nodes: Annotated[int, Field(ge=1)] | None = None
    groups: list[dict[str, Any]] | None = None
    ports: list[Annotated[PortMapping, BeforeValidator(read_port)]] = Field(default_factory=list)
    commands: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something_to_run(self) -> TaskConfiguration:
        if not self.commands and self.image is None and not self.groups:
            raise ValueError("Either `commands` or `image` must be set")
        return self


class ServiceConfiguration(Configuration):
    """Hold a service."""

    type: Literal["service"] = "service"
    port: Annotated[PortMapping, BeforeValidator(read_service_port)]
    gateway: bool | str | EntityReference | None = None
    strip_prefix: bool = True
    model: dict[str, Any] | None = None
    https: bool | Literal["auto"] | None = None
    auth: bool = True
    scaling: dict[str, Any] | None = None
    rate_limits: list[dict[str, Any]] = Field(default_factory=list)
    probes: list[dict[str, Any]] | None = None
    replicas: IntRange | None = None
    groups: list[dict[str, Any]] | None = None
    commands: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _plain_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            model = {"type": "chat", "name": value["model"], "format": "openai", "prefix": "/v1"}
            return {**value, "model": model}
        return value

    @model_validator(mode="after")
    def _something_to_run(self) -> ServiceConfiguration:
        if not self.commands and self.image is None and not self.groups:
            raise ValueError("Either `commands` or `image` must be set")
        return self


class DevEnvironmentConfiguration(Configuration):
    """Hold a dev environment."""

    type: Literal["dev-environment"] = "dev-environment"
    ide: Literal["vscode", "cursor", "windsurf", "zed"] | None = None
    version: str | None = None
    init: list[str] = Field(default_factory=list)
    inactivity_duration: IdleSeconds = None
    ports: list[Annotated[PortMapping, BeforeValidator(read_port)]] = Field(default_factory=list)


AnyConfiguration = TaskConfiguration | ServiceConfiguration | DevEnvironmentConfiguration


class RemoteRepoData(Strict):
    """Name a git commit."""

    repo_type: Literal["remote"] = "remote"
    repo_name: str
    repo_branch: str | None = None
    repo_hash: str | None = None
    repo_diff: str | None = None
    repo_config_name: str | None = None
    repo_config_email: str | None = None


class LocalRepoData(Strict):
    """Name a folder whose content was uploaded as a tar."""

    repo_type: Literal["local"] = "local"
    repo_dir: str


class VirtualRepoData(Strict):
    """Stand for no repo, or for a tar without a folder."""

    repo_type: Literal["virtual"] = "virtual"


RepoData = Annotated[RemoteRepoData | LocalRepoData | VirtualRepoData, Field(discriminator="repo_type")]


class RunSpec(Strict):
    """Hold all that describes a run (PROTOCOL 2.4)."""

    run_name: str | None = None
    repo_id: str | None = None
    repo_data: RepoData | None = None
    repo_code_hash: str | None = None
    repo_dir: str | None = None
    file_archives: list[FileArchiveMapping] = Field(default_factory=list)
    working_dir: str | None = None
    configuration_path: str | None = None
    configuration: Annotated[AnyConfiguration, Field(discriminator="type")]
    profile: Profile | None = None
    ssh_key_pub: str | None = None

    def setting(self, name: str) -> Any:
        """Return a scheduling key of the configuration, else of the profile, else None."""
        value = getattr(self.configuration, name)
        return getattr(self.profile, name) if value is None and self.profile is not None else value

    def with_defaults(self, public_key: str) -> RunSpec:
        """Return the spec the server stores: every default filled in (PROTOCOL 1.4, `effective_run_spec`)."""
        spec = self.model_copy(deep=True)
        spec.repo_id = spec.repo_id or "none"
        spec.repo_data = spec.repo_data or VirtualRepoData()
        spec.ssh_key_pub = spec.ssh_key_pub or public_key
        configuration = spec.configuration
        configuration.priority = configuration.priority or 0
        if isinstance(configuration, TaskConfiguration):
            configuration.nodes = configuration.nodes or 1
        gpu = configuration.resources.gpu
        if gpu is not None and gpu.vendor is None:
            gpu.vendor = "nvidia"
        return spec
