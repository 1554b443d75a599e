"""The smaller parts of a run specification: environment, ports, images, mounts, files and repos."""

from __future__ import annotations

import re
import string
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from dstack_core.local.errors import ServerBugError
from dstack_core.local.quantities import Strict

Python = Literal["3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]
Port = Annotated[int, Field(gt=0, le=65535)]
_ENV = r"^([a-zA-Z_][a-zA-Z0-9_]*)(=.*$|$)"


class _NoValue(BaseModel):
    """The placeholder that dstack's client sends for a variable without a value."""

    model_config = ConfigDict(extra="forbid")
    key: str


_env: TypeAdapter[list[str] | dict[str, str | _NoValue]] = TypeAdapter(
    list[Annotated[str, Field(pattern=_ENV)]] | dict[str, str | _NoValue],
    config=ConfigDict(coerce_numbers_to_str=True),
)


def read_env(value: Any) -> Any:
    """Return environment variables as a dict; raises ServerBugError if one has no value (PROTOCOL 1.1)."""
    found = _env.validate_python(value)
    if isinstance(found, dict):
        if any(isinstance(text, _NoValue) for text in found.values()):
            raise ServerBugError
        return found
    names = [item.partition("=")[0] for item in found]
    if len(set(names)) < len(names):
        raise ValueError("Duplicate environment variable")
    if not all("=" in item for item in found):
        raise ServerBugError
    return dict(item.split("=", 1) for item in found)


def read_port(value: Any) -> Any:
    """Return the mapping of ``8080``, ``"8080:80"`` or ``"*:80"`` (PROTOCOL 3.2)."""
    if isinstance(value, str):
        match = re.fullmatch(r"(?:(\d+|\*):)?(\d+)\n?", value)
        if match is None:
            raise ValueError(f"Cannot parse the port mapping {value}")
        local = match[1] or match[2]
        return {"local_port": None if local == "*" else int(local), "container_port": int(match[2])}
    return {"local_port": value, "container_port": value} if isinstance(value, int) else value


def read_service_port(value: Any) -> Any:
    """Return the mapping of a service's port, which a bare number maps to port 80 (PROTOCOL 3.2)."""
    if isinstance(value, str) and ":" in value:
        if re.fullmatch(r"\d+:\d+", value) is None:
            raise ValueError(f"Cannot parse the port mapping {value}")
        return read_port(value)
    return value if isinstance(value, dict) else {"local_port": 80, "container_port": value}


def read_python(value: Any) -> Any:
    """Return a Python version; ``3.10`` without quotes in a YAML file is the number 3.1."""
    return {3.1: "3.10"}.get(value, str(value)) if isinstance(value, float) else value


def check_shell(value: str | None) -> str | None:
    """Raise ValueError unless a shell is one of the known names or an absolute path."""
    if value is None or value in ("sh", "bash") or PurePosixPath(value).is_absolute():
        return value
    raise ValueError("The value must be `sh`, `bash`, or an absolute path")


def check_user(value: str | None) -> str | None:
    """Raise ValueError unless a user is ``name`` or ``id``, with or without a group."""
    for part in () if value is None else (parts := value.split(":")):
        if len(parts) > 2 or not part or re.fullmatch(r"\s*-\s*\d+\s*", part):
            raise ValueError(f"invalid user format: {value}")
    return value


class PortMapping(Strict):
    """A port of the caller's machine (None: any free one) and a port of the job."""

    local_port: Port | None = None
    container_port: Port


class RegistryAuth(Strict):
    """The credentials of an image registry."""

    username: str
    password: str


def _split_path(text: str) -> list[str]:
    """Split at colons, but not after the letter of a Windows drive."""
    parts = text.split(":")
    drive = len(parts) > 1 and len(parts[0]) == 1 and parts[0] in string.ascii_letters
    if drive and parts[1][:1] in ("\\", "/"):
        parts[:2] = [f"{parts[0]}:{parts[1]}"]
    return parts


class FilePathMapping(Strict):
    """A path of the caller's machine and one of the job."""

    local_path: str
    path: str

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = _split_path(value)
        if len(parts) > 2:
            raise ValueError(f"invalid file path mapping: {value}")
        return {"local_path": parts[0], "path": parts[-1]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if PureWindowsPath(self.path).is_absolute():
            raise ValueError(f"path must be a Unix file path: {self.path}")
        return self


class FileArchiveMapping(Strict):
    """An uploaded archive and its path in the job (PROTOCOL 1.3)."""

    id: UUID
    path: str


class RepoSpec(Strict):
    """A git repository for the job; the client resolves it, and the server only stores it."""

    local_path: str | None = None
    url: str | None = None
    branch: str | None = None
    hash: str | None = None
    path: str = "."
    if_exists: Literal["error", "skip"] = "error"

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        is_url = len(parts) > 1 and ("@" in parts[0] or parts[1].startswith("//"))
        parts = [":".join(parts[:2]), *parts[2:]] if is_url else _split_path(value)
        if len(parts) > 2:
            raise ValueError(f"Invalid repo: {value}")
        return {"url" if is_url else "local_path": parts[0], **({"path": parts[1]} if len(parts) > 1 else {})}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.local_path) == bool(self.url):
            raise ValueError("Either `local_path` or `url` must be specified, not both")
        if self.path.startswith("~") and PurePosixPath(self.path).parts[0] != "~":
            raise ValueError("`~username` syntax is not supported")
        return self


def _read_mount_path(value: str) -> str:
    path = PurePosixPath(value)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"path must be absolute and without ..: {value}")
    return str(path)


MountPath = Annotated[str, AfterValidator(_read_mount_path)]


class VolumeMountPoint(Strict):
    """A network volume, or several, one of which is mounted."""

    name: str | list[str]
    path: MountPath


class InstanceMountPoint(Strict):
    """A folder of the machine."""

    instance_path: MountPath
    path: MountPath
    optional: bool = False


def _read_mount(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    source, separator, path = value.partition(":")
    if not separator or ":" in path:
        raise ValueError(f"invalid mount point format: {value}")
    return {"instance_path" if "/" in source else "name": source, "path": path}


Mount = Annotated[VolumeMountPoint | InstanceMountPoint, BeforeValidator(_read_mount)]
