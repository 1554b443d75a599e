"""Quantities of a configuration: durations, memory sizes, ranges and the resources of a job."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator, model_validator

from dstack_core.local.gpu_vendors import Vendor

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_GIGABYTES = {"mb": 1 / 1024, "gb": 1.0, "tb": 1024.0}
_VENDORS = {name: name for name in ("nvidia", "amd", "google", "intel", "tenstorrent")}
_VENDORS |= {"tpu": "google", "tt": "tenstorrent"}


class Strict(BaseModel):
    """A model that rejects unknown keys and reads numbers as strings, like the server (PROTOCOL 0, 1.1)."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def parse_duration(value: Any) -> int:
    """Return a duration in whole seconds for a number or a string such as ``"90s"``, ``"2h"`` or ``"1d"``.

    Raises ValueError for anything else (PROTOCOL 3.2).
    """
    if isinstance(value, int | float):
        return int(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
        match = re.fullmatch(r"(\d+) *([smhdw])\n?", value)
        if match is not None:
            return int(match[1]) * _SECONDS[match[2]]
    raise ValueError(f"Cannot parse the duration {value}")


def _duration_or_off(value: Any) -> Any:
    if value is True or value is None:
        return None
    if value is False or value == "off":
        return "off"
    seconds = parse_duration(value)
    if seconds < 0:
        raise ValueError("Duration cannot be negative")
    return seconds


def _idle(value: Any) -> Any:
    # Older clients send -1 for "off".
    if value is False or value in ("off", -1):
        return -1
    return None if value is True or value is None else parse_duration(value)


def _inactivity(value: Any) -> Any:
    seconds = _duration_or_off(value)
    return None if seconds == "off" else seconds


Seconds = Annotated[int, BeforeValidator(parse_duration)]
SecondsOrOff = Annotated[Literal["off"] | int | None, BeforeValidator(_duration_or_off)]
IdleSeconds = Annotated[int | None, BeforeValidator(_idle)]
InactivitySeconds = Annotated[int | None, BeforeValidator(_inactivity)]


def parse_memory(value: Any) -> float:
    """Return a size in GB for a number (already GB) or a string such as ``"512MB"`` or ``"24GB"``.

    Raises ValueError for anything else (PROTOCOL 3.2).
    """
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        text = value.replace(" ", "").lower()
        unit = text[-2:] if text[-2:] in _GIGABYTES else ""
        return float(text.removesuffix(unit)) * _GIGABYTES.get(unit, 1.0)
    raise ValueError(f"Cannot parse the memory size {value}")


Gigabytes = Annotated[float, BeforeValidator(parse_memory)]


def _as_range(value: Any) -> Any:
    if isinstance(value, str) and ".." in value:
        ends = value.replace(" ", "").split("..")
        if len(ends) != 2:
            raise ValueError(f"Cannot parse the range {value}")
        return {"min": ends[0] or None, "max": ends[1] or None}
    return {"min": value, "max": value} if isinstance(value, str | int | float) else value


class _Range(Strict):
    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _as_range(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = getattr(self, "min", None), getattr(self, "max", None)
        if low is None and high is None:
            raise ValueError("Invalid empty range: ..")
        if low is not None and high is not None and low > high:
            raise ValueError(f"Invalid range order: {low}..{high}")
        return self


class IntRange(_Range):
    """A range of whole numbers; a bare number means exactly that many (PROTOCOL 2.4)."""

    min: int | None = None
    max: int | None = None


class MemoryRange(_Range):
    """A range of memory sizes in GB; a bare size means exactly that much (PROTOCOL 2.4)."""

    min: Gigabytes | None = None
    max: Gigabytes | None = None


def _tokens(kind: str, value: int | str) -> list[str]:
    tokens = str(value).replace(" ", "").split(":")
    if "" in tokens:
        raise ValueError(f"{kind} spec contains empty token: {value}")
    return tokens


def _set_once(kind: str, spec: dict[str, Any], key: str, value: Any) -> None:
    if key in spec:
        raise ValueError(f"{kind} spec {key} conflict: {value}")
    spec[key] = value


class CPUSpec(Strict):
    """The processors of a job; ``"x86:4.."`` is read too."""

    arch: Literal["x86", "arm"] | None = None
    count: IntRange = IntRange(min=2)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, int | str):
            spec: dict[str, Any] = {}
            for token in _tokens("CPU", value):
                key = "count" if ".." in token or token.isdigit() else "arch"
                _set_once("CPU", spec, key, token)
            return spec
        counted = isinstance(value, dict) and value and value.keys() <= {"min", "max"}
        return {"count": value} if counted else value

    @field_validator("arch", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


def _capability(value: Any) -> Any:
    parts = str(value).strip().split(".") if isinstance(value, float | str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError(f"Invalid compute capability: {value}")
    return [int(part) for part in parts]


def _names(value: Any) -> Any:
    if value is None:
        return None
    names = value if isinstance(value, list) else [value]
    return [name.removeprefix("tpu-") if isinstance(name, str) else name for name in names]


def _gpu_from_text(value: int | str) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for token in _tokens("GPU", value):
        if token.lower() in _VENDORS:
            _set_once("GPU", spec, "vendor", token)
        elif token[0].isalpha():
            names = token.split(",")
            if "" in names:
                raise ValueError(f"GPU name can not be empty: {value}")
            _set_once("GPU", spec, "name", names)
        else:
            # A memory size has a unit, a count does not.
            _set_once("GPU", spec, "memory" if any(map(str.isalpha, token)) else "count", token)
    return spec


class GPUSpec(Strict):
    """The GPUs of a job; ``"A100:40GB:2"`` and a plain count are read too."""

    vendor: Vendor | None = None
    name: Annotated[list[str] | None, BeforeValidator(_names)] = None
    count: IntRange = IntRange(min=1)
    memory: MemoryRange | None = None
    total_memory: MemoryRange | None = None
    compute_capability: Annotated[list[int], BeforeValidator(_capability)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _gpu_from_text(value) if isinstance(value, int | str) else value

    @field_validator("vendor", mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        return _VENDORS.get(value.lower(), value) if isinstance(value, str) else value


class DiskSpec(Strict):
    """The disk of a job in GB."""

    size: MemoryRange

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return {"size": value} if isinstance(value, str | int | float) else value


class ResourcesSpec(Strict):
    """The resources that a job requests, with the server's defaults (PROTOCOL 1.5)."""

    cpu: CPUSpec = CPUSpec()
    memory: MemoryRange = MemoryRange(min=8.0)
    shm_size: Gigabytes | None = None
    gpu: GPUSpec | None = GPUSpec(count=IntRange(min=0))
    disk: DiskSpec | None = DiskSpec(size=MemoryRange(min=100.0))
