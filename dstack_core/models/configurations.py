"""What a run does: tasks and services.

Documented fields are typed; any other key of today's YAML configuration is kept and passed through
to the server, which checks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from dstack_core.models.base import Model
from dstack_core.models.files import FileMapping
from dstack_core.models.repos import RepoMapping

_PORT = re.compile(r"(\*|\d+)(:\d+)?")
_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


class RegistryAuth(Model):
    """Hold the credentials of a private Docker registry; the password stays out of every repr.

    ``username`` (str), ``password`` (str). Source: the documented API, "RegistryAuth".
    """

    username: str
    password: str = Field(repr=False)


class PortMapping(Model):
    """Map ``container_port`` to ``local_port`` (None: any free port) when a run is attached."""

    container_port: int = Field(ge=1, le=65535)
    local_port: int | None = Field(default=None, ge=1, le=65535)


class Configuration(Model):
    """Hold a run configuration of any type: a task, a service, or one the server knows.

    Raises ``ConfigurationError`` on input that no server accepts (PROTOCOL 1.1, 3.2): both ``python``
    and ``image``, an ``env`` item without ``=``, a port that is no port.
    """

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    type: str
    commands: list[str] | None = None
    env: dict[str, str] | list[str] | None = None
    python: str | None = None
    image: str | None = None
    entrypoint: str | None = None
    registry_auth: RegistryAuth | None = None
    files: list[FileMapping] | None = None
    repos: list[RepoMapping] | None = Field(default=None, max_length=1)

    @field_validator("commands", mode="before")
    @classmethod
    def _one_command_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("python", mode="before")
    @classmethod
    def _python_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("env", mode="before")
    @classmethod
    def _env_as_mapping(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _env_from_pairs(value.items())
        if isinstance(value, list | tuple):
            return _env_from_pairs(_split_env(number, item) for number, item in enumerate(value, 1))
        return value

    @field_validator("image")
    @classmethod
    def _python_or_image(cls, image: str | None, info: ValidationInfo) -> str | None:
        python = info.data.get("python")
        if python is not None and image is not None:
            raise ValueError(f"python={python!r} and image={image!r} exclude each other; drop one of the two")
        return image

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Show the names of env variables, never their values."""
        for name, value in super().__repr_args__():
            shown = dict.fromkeys(value, "***") if name == "env" and isinstance(value, dict) else value
            yield name, shown


class Task(Configuration):
    """Run commands to their end on one or more nodes.

    ``commands`` (list of str), ``ports`` (list of int, ``"8080:80"``, ``"*:80"`` or ``PortMapping``),
    ``env`` (dict, or list of ``NAME=value``), ``python`` or ``image`` (str), ``entrypoint`` (str),
    ``registry_auth`` (``RegistryAuth``), ``files`` (list of ``FileMapping`` or ``"local:container"``,
    servers 0.19.17 and newer),
    ``repos`` (one ``RepoMapping``, path or address); further keys of today's task configuration (``nodes``,
    ``fleets``, ``volumes``, ...) pass through. Source: the documented API, "Task".
    """

    type: Literal["task"] = "task"
    ports: list[int | str | PortMapping] | None = None

    @field_validator("ports")
    @classmethod
    def _check_ports(
        cls, value: list[int | str | PortMapping] | None
    ) -> list[int | str | PortMapping] | None:
        for port in value or []:
            _check_port(port)
        return value


class Service(Configuration):
    """Run commands that answer HTTP on ``port`` until the run is stopped.

    ``port`` (int, or ``"80:8000"``) is required; the other fields are those of ``Task``. Source: the
    documented API, "Service".
    """

    type: Literal["service"] = "service"
    port: int | str | PortMapping

    @field_validator("port")
    @classmethod
    def _check_service_port(cls, value: int | str | PortMapping) -> int | str | PortMapping:
        _check_port(value)
        return value


def _check_port(port: int | str | PortMapping) -> None:
    if isinstance(port, int) and not 1 <= port <= 65535:
        raise ValueError(f"{port} is no port; write a number from 1 to 65535")
    if isinstance(port, str) and not _PORT.fullmatch(port):
        raise ValueError(f'{port!r} is no port mapping; write 80, "8080:80" or "*:80"')


def _split_env(number: int, item: Any) -> tuple[str, str]:
    name, equals, value = str(item).partition("=")
    if not equals:
        # A value pasted where NAME=value belongs may be a secret: only what looks like a name is shown.
        shown = f" ({name})" if _ENV_NAME.fullmatch(name) else ""
        raise ValueError(
            f"item {number}{shown} has no '='; write NAME=value, or pass a dict such as "
            '{"NAME": os.environ["NAME"]} to take it from this process'
        )
    return name, value


def _env_from_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    env: dict[str, str] = {}
    for name, value in pairs:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(
                f'the value of {name} is a {type(value).__name__}; write it as text, e.g. "true"'
            )
        env[str(name)] = str(value)
    return env
