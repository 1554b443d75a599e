"""Run specifications as the 0.22.5 server accepts and stores them (PROTOCOL 1.3, 1.4, 3.2)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dstack_core.local.groups import (
    NodeGroup,
    ReplicaGroup,
    check_image_sources,
    check_replica_groups,
    name_groups,
)
from dstack_core.local.profiles import EntityReference, Profile, ProfileParams, as_reference
from dstack_core.local.quantities import InactivitySeconds, IntRange, ResourcesSpec, Strict
from dstack_core.local.service_parts import (
    Model,
    Probe,
    RateLimit,
    Scaling,
    check_limits,
    check_probes,
    check_replicas,
    check_scaling,
    read_model,
)
from dstack_core.local.spec_parts import (
    FileArchiveMapping,
    FilePathMapping,
    Mount,
    PortMapping,
    Python,
    RegistryAuth,
    RepoSpec,
    check_shell,
    check_user,
    read_env,
    read_port,
    read_python,
    read_service_port,
)

_Ports = list[Annotated[PortMapping, BeforeValidator(read_port)]]


class Configuration(ProfileParams):
    """The keys that tasks, services and dev environments share."""

    name: str | None = None
    image: str | None = None
    user: Annotated[str | None, AfterValidator(check_user)] = None
    privileged: bool = False
    entrypoint: str | None = None
    working_dir: str | None = None
    home_dir: str = "/root"
    registry_auth: RegistryAuth | None = None
    python: Annotated[Python | None, BeforeValidator(read_python)] = None
    nvcc: bool | None = None
    single_branch: bool | None = None
    env: Annotated[dict[str, str], BeforeValidator(read_env)] = Field(default_factory=dict)
    shell: Annotated[str | None, AfterValidator(check_shell)] = None
    resources: ResourcesSpec = ResourcesSpec()
    priority: Annotated[int, Field(ge=0, le=100)] | None = None
    volumes: list[Mount] = Field(default_factory=list)
    docker: bool | None = None
    repos: Annotated[list[RepoSpec], Field(max_length=1)] = Field(default_factory=list)
    files: list[FilePathMapping] = Field(default_factory=list)
    dstack: bool = False
    setup: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_image(self) -> Self:
        check_image_sources(self)
        return self


class TaskConfiguration(Configuration):
    """A task."""

    type: Literal["task"] = "task"
    nodes: Annotated[int, Field(ge=1)] | None = None
    groups: list[NodeGroup] | None = None
    ports: _Ports = Field(default_factory=list)
    commands: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_nodes(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("groups") is not None and value.get("nodes") is not None:
            raise ValueError("`nodes` and `groups` are mutually exclusive")
        return value

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if self.groups is None:
            if not self.commands and not self.image:
                raise ValueError("Either `commands` or `image` must be set")
            return self
        name_groups(self.groups)
        if self.commands or self.ports or self.entrypoint is not None:
            raise ValueError("`commands`, `ports` and `entrypoint` are not allowed when `groups` is set")
        if self.image is None and not all(group.commands for group in self.groups):
            raise ValueError("Either `commands` must be set in each group, or `image` for all")
        return self


class ServiceConfiguration(Configuration):
    """A service."""

    type: Literal["service"] = "service"
    port: Annotated[PortMapping, BeforeValidator(read_service_port)]
    gateway: Annotated[
        bool | EntityReference | str | None,
        Field(union_mode="left_to_right"),
        AfterValidator(as_reference),
    ] = None
    strip_prefix: bool = True
    model: Annotated[Model | None, BeforeValidator(read_model)] = None
    https: bool | Literal["auto"] | None = None
    auth: bool = True
    scaling: Scaling | None = None
    rate_limits: Annotated[list[RateLimit], AfterValidator(check_limits)] = Field(default_factory=list)
    probes: Annotated[list[Probe] | None, AfterValidator(check_probes)] = None
    replicas: Annotated[IntRange | None, AfterValidator(check_replicas)] = None
    groups: list[ReplicaGroup] | None = None
    commands: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_replicas(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if value.get("groups") is None and isinstance(value.get("replicas"), list):
            value["groups"] = value.pop("replicas")
        if value.get("groups") is not None and value.get("replicas") is not None:
            raise ValueError("`replicas` and `groups` are mutually exclusive")
        return value

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if self.groups is not None:
            name_groups(self.groups)
            check_replica_groups(self)
            return self
        check_scaling(self.replicas or IntRange(min=1, max=1), self.scaling)
        if not self.commands and not self.image:
            raise ValueError("Either `commands` or `image` must be set")
        return self


class DevEnvironmentConfiguration(Configuration):
    """A dev environment."""

    type: Literal["dev-environment"] = "dev-environment"
    ide: Literal["vscode", "cursor", "windsurf", "zed"] | None = None
    version: str | None = None
    init: list[str] = Field(default_factory=list)
    inactivity_duration: InactivitySeconds = None
    ports: _Ports = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.entrypoint is not None:
            raise ValueError("entrypoint is not supported for dev-environment")
        if self.version and self.ide is None:
            raise ValueError("`version` requires `ide` to be set")
        if self.ide == "windsurf" and self.version and not re.match(r"^.+@[a-f0-9]+$", self.version):
            raise ValueError("Expected a Windsurf version such as `1.106.0@8951cd3a`")
        if self.dstack and self.inactivity_duration is not None:
            raise ValueError("`dstack` is not supported together with `inactivity_duration`")
        return self


AnyConfiguration = TaskConfiguration | ServiceConfiguration | DevEnvironmentConfiguration


class RemoteRepoData(Strict):
    """A git commit, and the identity to commit with."""

    repo_type: Literal["remote"] = "remote"
    repo_name: str
    repo_branch: str | None = None
    repo_hash: str | None = None
    repo_diff: Annotated[str | None, Field(exclude=True)] = None
    repo_config_name: str | None = None
    repo_config_email: str | None = None


class LocalRepoData(Strict):
    """A folder whose contents were uploaded as a tar."""

    repo_type: Literal["local"] = "local"
    repo_dir: str


class VirtualRepoData(Strict):
    """The absence of a repo, or a tar without a folder."""

    repo_type: Literal["virtual"] = "virtual"


RepoData = Annotated[RemoteRepoData | LocalRepoData | VirtualRepoData, Field(discriminator="repo_type")]


class RunSpec(Strict):
    """The complete description of a run (PROTOCOL 2.4)."""

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
    # Clients may send it; it has no effect.
    merged_profile: Annotated[Profile, Field(exclude=True)] = Profile()

    def setting(self, name: str) -> Any:
        """Return a scheduling key of the configuration, else of the profile, else None."""
        value = getattr(self.configuration, name)
        return getattr(self.profile, name) if value is None and self.profile is not None else value
