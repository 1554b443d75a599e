"""Quantities of a configuration: durations, memory sizes, ranges and the resources of a job."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_GIGABYTES = {"MB": 1 / 1024, "GB": 1.0, "TB": 1024.0}
_VENDORS = ("nvidia", "amd", "google", "intel", "tenstorrent")


class Strict(BaseModel):
    """Refuse unknown keys and read a number where text is expected, as the server does (PROTOCOL 0, 1.1)."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def parse_duration(value: Any) -> Any:
    """Return a duration in whole seconds for an int or a text such as ``"90s"``, ``"2h"`` or ``"1d"``.

    Raises ValueError for other text (PROTOCOL 3.2).
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*([smhdw]?)\s*", value)
        if match is None:
            raise ValueError(f"Cannot parse the duration {value}")
        return int(match[1]) * _SECONDS[match[2] or "s"]
    return value


def _duration_or_off(value: Any) -> Any:
    if value is True:
        return None
    if value is False or value == "off":
        return "off"
    return parse_duration(value)


def _idle(value: Any) -> Any:
    switched = _duration_or_off(value)
    return -1 if switched == "off" else switched


Seconds = Annotated[int, BeforeValidator(parse_duration)]
SecondsOrOff = Annotated[Literal["off"] | int | None, BeforeValidator(_duration_or_off)]
IdleSeconds = Annotated[int | None, BeforeValidator(_idle)]


def parse_memory(value: Any) -> Any:
    """Return a size in GB for a number (already GB) or a text such as ``"512MB"`` or ``"24GB"``.

    Raises ValueError for other text (PROTOCOL 3.2).
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|TB)?\s*", value.upper())
        if match is None:
            raise ValueError(f"Cannot parse the memory size {value}")
        return float(match[1]) * _GIGABYTES[match[2] or "GB"]
    return value


Gigabytes = Annotated[float, BeforeValidator(parse_memory)]


def _as_range(value: Any) -> Any:
    if isinstance(value, str) and ".." in value:
        low, high = (part.strip() or None for part in value.split("..", 1))
        if low is None and high is None:
            raise ValueError(f"Cannot parse the range {value}")
        return {"min": low, "max": high}
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return {"min": value, "max": value}
    return value


class IntRange(Strict):
    """Hold a range of whole numbers; a bare number means exactly that many (PROTOCOL 2.4)."""

    min: int | None = None
    max: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _as_range(value)


class MemoryRange(Strict):
    """Hold a range of memory sizes in GB; a bare size means exactly that much (PROTOCOL 2.4)."""

    min: Gigabytes | None = None
    max: Gigabytes | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _as_range(value)


class CPUSpec(Strict):
    """Hold the processors of a job; ``"x86:4.."`` is read too."""

    arch: Literal["x86", "arm"] | None = None
    count: IntRange = IntRange(min=2)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str) and ":" in value:
            arch, count = value.split(":", 1)
            return {"arch": arch.strip(), "count": count}
        if isinstance(value, int | str):
            return {"count": value}
        return (
            {"count": value}
            if isinstance(value, dict) and value.keys() <= {"min", "max"} and value
            else value
        )


def _capability(value: Any) -> Any:
    return [int(part) for part in str(value).split(".")] if isinstance(value, float | str) else value


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _gpu_from_text(text: str) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for token in (part.strip() for part in text.split(":")):
        if token.lower() in _VENDORS:
            spec["vendor"] = token.lower()
        elif re.fullmatch(r"\d*(\.\.)?\d*", token) and token:
            spec["count"] = token
        elif re.fullmatch(r"[\d.]+\s*(MB|GB|TB)?(\.\.)?([\d.]+\s*(MB|GB|TB))?", token.upper()):
            spec["memory"] = token
        elif token:
            spec["name"] = token
        else:
            raise ValueError(f"Cannot parse the GPU {text}")
    return spec


class GPUSpec(Strict):
    """Hold the GPUs of a job; ``"A100:40GB:2"`` and a plain count are read too."""

    vendor: Literal["nvidia", "amd", "google", "intel", "tenstorrent"] | None = None
    name: Annotated[list[str] | None, BeforeValidator(_names)] = None
    count: IntRange = IntRange(min=1)
    memory: MemoryRange | None = None
    total_memory: MemoryRange | None = None
    compute_capability: Annotated[list[int] | None, BeforeValidator(_capability)] = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"count": value}
        return _gpu_from_text(value) if isinstance(value, str) else value


class DiskSpec(Strict):
    """Hold the disk of a job in GB."""

    size: MemoryRange

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return {"size": value} if isinstance(value, str | int | float) else value


class ResourcesSpec(Strict):
    """Hold the resources a job asks for, with the server's defaults (PROTOCOL 1.5)."""

    cpu: CPUSpec = CPUSpec()
    memory: MemoryRange = MemoryRange(min=8.0)
    shm_size: Gigabytes | None = None
    gpu: GPUSpec | None = GPUSpec(count=IntRange(min=0))
    disk: DiskSpec | None = DiskSpec(size=MemoryRange(min=100.0))
