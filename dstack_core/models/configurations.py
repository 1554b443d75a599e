"""What a run does: tasks and services.

Documented fields are typed, and so is what people write in YAML today; any other key is kept and passed
through to the server, which checks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    InstanceOf,
    SecretStr,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from dstack_core.models.base import Model
from dstack_core.models.files import FileMapping
from dstack_core.models.profiles import ProfileFields
from dstack_core.models.repos import RepoMapping
from dstack_core.models.resources import Resources

_PORT = re.compile(r"(\*|\d+)(:\d+)?")
_FILES = TypeAdapter(list[FileMapping])
_REPOS = TypeAdapter(list[RepoMapping])
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class RegistryAuth(Model):
    """Hold the credentials of a private Docker registry; the password stays out of every repr.

    ``username`` (str), ``password`` (str). Source: the documented API, "RegistryAuth".
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)
    _form = "a mapping of username and password"

    username: str
    password: str = Field(repr=False)


class PortMapping(Model):
    """Map ``container_port`` to ``local_port`` (None: any free port) when a run is attached."""

    container_port: int = Field(ge=1, le=65535)
    local_port: int | None = Field(default=None, ge=1, le=65535)


class Configuration(ProfileFields):
    """A run configuration of any type: a task, a service, or one the server knows.

    What runs: ``commands`` (list of str), ``env`` (dict, or list of ``NAME=value``; a name without a value
    gets it where the run is submitted, and ``"${{ secrets.hf_token }}"`` is filled in by the server),
    ``python`` or ``image`` or ``docker``, ``entrypoint``, ``registry_auth``, ``user``, ``privileged``,
    ``shell``, ``working_dir``, ``volumes`` (``"name:/path"``, ``"/host/path:/path"`` or mappings), ``files``,
    ``repos``.

    Where: ``resources`` (``Resources``, or a mapping or a short form as in YAML), ``fleets``, ``instances``,
    ``backends``, ``backend_options``, ``regions``, ``availability_zones``, ``instance_types``,
    ``reservation``, ``spot_policy``, ``creation_policy``, ``max_price`` (USD per hour).

    When and how long: ``max_duration``, ``stop_duration``, ``idle_duration`` (an int in seconds, a str
    such as ``"2h"``; ``"off"`` or False for no limit), ``retry`` (bool, or a mapping of ``on_events`` and
    ``duration``), ``utilization_policy`` (a mapping of ``min_gpu_utilization``, percent, and
    ``time_window``), ``schedule`` (a mapping of ``cron``), ``priority`` (0 to 100, higher goes first).

    ``name`` is the run's name, ``tags`` (dict of str) go to the cloud's resources, ``single_branch``
    (bool) is how a Git repository is cloned. A number is read as text where a text is expected, and the
    reverse, as dstack's own client does. A name or a size that only the server can judge is judged by the
    server. Raises ``ConfigurationError`` on input that no server accepts (PROTOCOL 1.1, 3.2): both ``python``
    and ``image``, a name twice in ``env``, a port that is no port.
    """

    type: str
    commands: list[str] | None = None
    env: Mapping[str, str | None] | list[str] | None = None
    python: str | None = None
    image: str | None = None
    entrypoint: str | None = None
    registry_auth: RegistryAuth | None = None
    name: str | None = None
    user: str | None = None
    privileged: bool | None = None
    docker: bool | None = None
    shell: str | None = None
    working_dir: str | None = None
    volumes: Sequence[str | Mapping[str, Any]] | None = None
    files: Sequence[FileMapping | Mapping[str, str] | str] | None = None
    repos: Sequence[RepoMapping | Mapping[str, str] | str] | None = None
    # An instance or a mapping as it is: a mapping is today's YAML, where numbers mean something else.
    resources: InstanceOf[Resources] | Mapping[str, Any] | str | int | None = None
    priority: int | None = None
    single_branch: bool | None = None

    @field_validator("commands", mode="before")
    @classmethod
    def _one_command_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("files", "repos", mode="before")
    @classmethod
    def _items_in_full(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if info.field_name == "files":
            return _FILES.validate_python(list(value), context=info.context)
        if len(value) > 1:
            raise ValueError(f"expected one item, got {len(value)}. A run starts from one repository")
        return _REPOS.validate_python(list(value), context=info.context)

    @field_validator("python", mode="before")
    @classmethod
    def _python_as_text(cls, value: Any) -> Any:
        return read_python(value)

    @field_validator("env", mode="before")
    @classmethod
    def _env_as_mapping(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _env_from_pairs(value.items())
        if isinstance(value, list | tuple):
            return _env_from_pairs(_split_env(number, item) for number, item in enumerate(value, 1))
        return value

    @field_validator("priority")
    @classmethod
    def _check_priority(cls, value: int | None) -> int | None:
        if value is not None and not 0 <= value <= 100:
            raise ValueError(f"expected a number from 0 to 100, got {value}")
        return value

    @field_validator("image")
    @classmethod
    def _python_or_image(cls, image: str | None, info: ValidationInfo) -> str | None:
        python = info.data.get("python")
        if python is not None and image is not None:
            raise ValueError(
                f"expected either python or image, got python={python!r} and image={image!r}. Remove one "
                "of them"
            )
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
    ``registry_auth`` (``RegistryAuth``), as documented; ``nodes`` (int), ``startup_order`` (``"any"``,
    ``"master-first"``, ``"workers-first"``) and ``stop_criteria`` (``"all-done"``, ``"master-done"``) of a
    task on several nodes, ``groups`` (mappings as in YAML) for nodes of several kinds, and all fields of
    ``Configuration``. Source: the documented API, "Task".
    """

    type: Literal["task"] = "task"
    # Strict where a member of the union is a model: what is no mapping must not become a number.
    ports: Sequence[StrictInt | StrictStr | PortMapping] | None = None
    nodes: int | None = None
    groups: Sequence[Mapping[str, Any]] | None = None

    @field_validator("groups", mode="before")
    @classmethod
    def _groups_as_sent(cls, value: Any) -> Any:
        return read_groups(value)

    @field_validator("ports")
    @classmethod
    def _check_ports(
        cls, value: Sequence[int | str | PortMapping] | None
    ) -> Sequence[int | str | PortMapping] | None:
        for port in value or []:
            _check_port(port)
        return value

    @field_validator("nodes")
    @classmethod
    def _check_nodes(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"expected 1 or more, got {value}")
        return value


class Service(Configuration):
    """Run commands that answer HTTP on ``port`` until the run is stopped.

    ``port`` (int, or ``"80:8000"``) is required. ``auth`` (bool; by default callers send the token of a
    project member), ``model`` (the name of the model it answers for, or a mapping), ``https``,
    ``gateway`` (a name; False for none), ``strip_prefix`` (bool), ``replicas`` (an int, or a range such as
    ``"0..4"``, which needs ``scaling``), ``groups`` (mappings as in YAML) for replicas of several kinds,
    ``probes`` and ``rate_limits`` (mappings as in YAML), and all fields of ``Configuration``. Source: the
    documented API, "Service".
    """

    type: Literal["service"] = "service"
    port: StrictInt | StrictStr | PortMapping
    auth: bool | None = None
    model: str | Mapping[str, Any] | None = None
    https: bool | str | None = None
    gateway: bool | str | Mapping[str, Any] | None = None
    strip_prefix: bool | None = None
    replicas: int | float | str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    groups: Sequence[Mapping[str, Any]] | None = None
    scaling: Mapping[str, Any] | None = None
    # Their headers may hold a token.
    probes: Sequence[Mapping[str, Any]] | None = Field(default=None, repr=False)
    rate_limits: Sequence[Mapping[str, Any]] | None = None

    @field_validator("replicas", "groups", mode="before")
    @classmethod
    def _groups_as_sent(cls, value: Any) -> Any:
        return read_groups(value)

    @field_validator("port", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("port")
    @classmethod
    def _check_service_port(cls, value: int | str | PortMapping) -> int | str | PortMapping:
        _check_port(value)
        return value


def read_python(value: Any) -> Any:
    """Return a version of Python as text; YAML and Airflow's native rendering read ``3.10`` as 3.1."""
    if isinstance(value, float):
        return "3.10" if value == 3.1 else str(value)
    return value


def read_groups(value: Any) -> Any:
    """Return groups of nodes or replicas with texts where YAML reads numbers."""
    if not isinstance(value, list | tuple):
        return value
    return [_read_group(group) if isinstance(group, Mapping) else group for group in value]


def _read_group(group: Mapping[str, Any]) -> dict[str, Any]:
    read = dict(group)
    if "python" in group:
        read["python"] = read_python(group["python"])
    if isinstance(group.get("commands"), list | tuple):
        read["commands"] = [_as_text(command) for command in group["commands"]]
    return read


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_port(port: int | str | PortMapping) -> None:
    if isinstance(port, int) and not 1 <= port <= 65535:
        raise ValueError(f"expected a port from 1 to 65535, got {port}")
    if isinstance(port, str) and not _PORT.fullmatch(port):
        raise ValueError(f'expected a port mapping such as 80, "8080:80" or "*:80", got {port!r}')


def _split_env(number: int, item: Any) -> tuple[str, str | None]:
    name, equals, value = item.partition("=") if isinstance(item, str) else ("", "", "")
    if not _ENV_NAME.fullmatch(name):
        # A value pasted where a name belongs may be a secret.
        raise ValueError(f"expected NAME=value or NAME as item {number}, got something else")
    return name, value if equals else None


def _env_from_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str | None]:
    env: dict[str, str | None] = {}
    for name, value in pairs:
        if str(name) in env:
            raise ValueError(f"expected each name once, got {name} twice")
        if isinstance(value, Mapping) and value == {"key": name}:
            # How dstack's own models write a name without a value.
            value = None
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise ValueError(
                f"expected a string for {name}, got a {type(value).__name__}. Write it as a string, such "
                'as "true"'
            )
        env[str(name)] = None if value is None else str(value)
    return env
