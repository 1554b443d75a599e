"""The configuration of a run: tasks, services, and other types that the server has.

Documented fields are typed, and so is what people write in YAML today. Any other key is kept and passed
through to the server, which checks it: a newer server may have fields that this version does not.
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
    """The credentials of a private Docker registry; the password stays out of every repr.

    Attributes:
        username: The name of the registry's user.
        password: The password or token.

    Source: the documented API, "RegistryAuth".
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)
    _form = "a mapping of username and password"

    username: str
    password: str = Field(repr=False)


class PortMapping(Model):
    """A port of the container, and the local port at which an attached run has it.

    Attributes:
        container_port: The port in the container, 1 to 65535.
        local_port: The local port, 1 to 65535; None: any free one.
    """

    container_port: int = Field(ge=1, le=65535)
    local_port: int | None = Field(default=None, ge=1, le=65535)


class Configuration(ProfileFields):
    """A run configuration of any type: a task, a service, or another type that the server has.

    A number is read as text where a text is expected, and the reverse, as dstack's own client does. Names and
    sizes that only the server can check are checked by the server.

    Attributes:
        type: ``"task"``, ``"service"`` or another type of the server.
        commands: What runs (list of str); one str is a list of one.
        env: A dict, or a list of ``NAME=value``. A name without a value gets it from the process that submits
            the run; the server fills in ``"${{ secrets.hf_token }}"``.
        python: The version of Python, such as ``"3.12"``; instead of ``image``.
        image: The Docker image; instead of ``python``.
        docker: Whether Docker is available in the container.
        entrypoint, user, privileged, shell: How the container starts.
        registry_auth: The credentials for a private image.
        working_dir: Where commands start.
        volumes: ``"name:/path"``, ``"/host/path:/path"``, or mappings as in YAML.
        files, repos: Files of this machine, and the Git repository that the run starts from.
        resources: ``Resources``, or a mapping or a short form as in YAML.
        backends, backend_options, regions, availability_zones: Where machines come from.
        fleets, instances, instance_types, reservation: Which machines are used.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"``.
        creation_policy: Whether the server may create machines.
        max_price: The highest price, in USD per hour.
        max_duration, stop_duration, idle_duration: An int in seconds, or a str such as ``"2h"``; ``"off"`` or
            False for no limit.
        retry: A bool, or a mapping of ``on_events`` and ``duration``.
        utilization_policy: A mapping of ``min_gpu_utilization`` (percent) and ``time_window``.
        schedule: A mapping of ``cron``, at which the server starts the run again and again.
        priority: 0 to 100; runs with a higher one start first.
        name: The run's name.
        tags: Tags of the cloud's resources (dict of str).
        single_branch: Whether only one branch of a Git repository is cloned.

    Raises:
        ConfigurationError: The input is one that no server accepts, such as both ``python`` and ``image``, a
            name twice in ``env``, or a port that is not a number from 1 to 65535.

    Source: PROTOCOL 1.1, 3.2.
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
    # A mapping is not turned into Resources: it means what it means in YAML, where numbers are not minimums.
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
    """A configuration whose commands run to their end, on one or more nodes; with all its other fields.

    Attributes:
        commands: What runs (list of str).
        ports: Ports to forward to an attached run: ints, ``"8080:80"`` (local port first), ``"*:80"`` (any
            free local port) or ``PortMapping``.
        env: A dict, or a list of ``NAME=value``.
        python, image: The version of Python, or a Docker image (str).
        entrypoint: The image's entrypoint (str).
        registry_auth: The credentials for a private image.
        nodes: How many nodes run the commands (int). Default: 1.
        groups: Nodes of several kinds, as mappings like in YAML.
        startup_order: Of several nodes: ``"any"``, ``"master-first"`` or ``"workers-first"``.
        stop_criteria: Of several nodes: ``"all-done"`` or ``"master-done"``.

    Example:
        ``Task(commands=["python train.py"], resources=Resources(gpu="24GB"), max_duration="2h")``

    Source: the documented API, "Task".
    """

    type: Literal["task"] = "task"
    # Strict, because the union has a model in it: a wrong value must not be turned into a number or a text.
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
    """A configuration whose commands answer HTTP until the run is stopped; with all its other fields.

    Attributes:
        port: The container's port (int), or ``"80:8000"``. Required.
        auth: Whether callers have to send the token of a project member. Default: yes.
        model: The name of the model that it answers for, or a mapping as in YAML.
        https: Whether, or how, it answers over https.
        gateway: The name of a gateway; False for none.
        strip_prefix: Whether the prefix of the service's address is removed from request paths.
        replicas: How many (int), or a range such as ``"0..4"``, which needs ``scaling``.
        groups: Replicas of several kinds, as mappings like in YAML.
        scaling: When the number of replicas changes, as a mapping like in YAML.
        probes, rate_limits: Mappings as in YAML.

    Example:
        ``Service(port=8000, commands=["vllm serve Qwen/Qwen3-8B"], model="Qwen/Qwen3-8B")``

    Source: the documented API, "Service".
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
    """Return a version of Python as text; YAML and Airflow's native rendering read ``3.10`` as 3.1.

    There is no Python 3.1 image, so 3.1 always means 3.10.
    """
    if isinstance(value, float):
        return "3.10" if value == 3.1 else str(value)
    return value


def read_groups(value: Any) -> Any:
    """Return groups of nodes or replicas, with texts in place of the numbers that YAML reads."""
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
    if isinstance(port, str) and not _PORT.fullmatch(port):
        raise ValueError(f'expected a port mapping such as 80, "8080:80" or "*:80", got {port!r}')
    numbers = [] if isinstance(port, PortMapping) else str(port).split(":")
    if any(number != "*" and not 1 <= int(number) <= 65535 for number in numbers):
        raise ValueError(f"expected a port from 1 to 65535, got {port!r}")


def _split_env(number: int, item: Any) -> tuple[str, str | None]:
    name, equals, value = item.partition("=") if isinstance(item, str) else ("", "", "")
    if not _ENV_NAME.fullmatch(name):
        # The error does not show it: a value pasted in place of a name may be a secret.
        raise ValueError(f"expected NAME=value or NAME as item {number}, got something else")
    return name, value if equals else None


def _env_from_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str | None]:
    env: dict[str, str | None] = {}
    for name, value in pairs:
        if str(name) in env:
            raise ValueError(f"expected each name once, got {name} twice")
        if isinstance(value, Mapping) and value == {"key": name}:
            # The form in which dstack's own models write a name without a value.
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
