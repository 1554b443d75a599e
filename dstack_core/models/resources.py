"""The hardware that a run requires."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import StrictInt, StrictStr, field_validator

from dstack_core.models.base import Model

_SIZE = re.compile(r"(\d+(\.\d+)?)\s*(MB|GB|TB)?", re.IGNORECASE)
_COUNT = re.compile(r"\d+")
_VENDORS = ("nvidia", "amd", "google", "tpu", "intel", "tenstorrent", "tt")
_ARCHITECTURE = re.compile(r"(x86|arm)(:|$)")


def _check_range(value: int | str | None, part: re.Pattern[str], examples: str) -> int | str | None:
    if value is None:
        return None
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"expected {examples}, got {value}")
        return value
    ends = [end.strip() for end in value.split("..")]
    fine = len(ends) <= 2 and any(ends) and all(part.fullmatch(end) for end in ends if end)
    if not fine:
        raise ValueError(f"expected {examples}, got {value!r}")
    return value


class GPU(Model):
    """The GPUs that a run requires; every number is a minimum.

    Attributes:
        name: One name or several, such as ``"A100"``.
        count: How many: an int, or a range such as ``"2..4"``.
        memory: The memory of each: a str with a unit such as ``"24GB"``, a range such as ``"24GB..80GB"``, or
            an int in MB.
        vendor: ``"nvidia"``, ``"amd"``, ``"google"`` or ``"intel"``.

    Raises:
        ConfigurationError: A value has another form.

    Source: the documented API, "GPU"; PROTOCOL 3.2.
    """

    name: str | list[str] | None = None
    count: int | str | None = None
    memory: int | str | None = None
    vendor: str | None = None

    @field_validator("count")
    @classmethod
    def _check_count(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _COUNT, 'a whole number such as 2, or a range such as "2..4"')

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _SIZE, 'a size such as "24GB", or a range such as "24GB..80GB"')


def parse_gpu(text: str | int) -> dict[str, Any]:
    """Return the fields that a short form such as ``"A100:40GB:2"`` names. Raises ``ValueError``."""
    fields: dict[str, Any] = {}
    for part in str(text).replace(" ", "").split(":"):
        value: str | list[str] = part
        if part.lower() in _VENDORS:
            key, value = "vendor", part.lower()
        elif part[:1].isalpha():
            key, value = "name", part.split(",")
        else:
            # A name begins with a letter, so a letter further on is a unit: "24GB", or a range of such sizes.
            key = "memory" if any(char.isalpha() for char in part) else "count"
        if not part or key in fields:
            raise ValueError(f'expected a form such as "24GB", "A100:40GB:2" or 1, got {text!r}')
        fields[key] = value
    return fields


class Resources(Model):
    """The hardware that a run requires; every number is a minimum.

    A mapping instead of ``Resources`` means what it means in a ``.dstack.yml``: there ``"24GB"`` and 2 are
    exact, and bare numbers are GB.

    Attributes:
        gpu: A ``GPU``, or a short form as in YAML (``"24GB"``, ``"A100:40GB:2"``, a count such as 1).
        memory: A str with a unit such as ``"24GB"``, a range, or an int in MB.
        shm_size: The size of the shared memory, like ``memory``.
        cpu: A whole number or a range, with ``"arm:"`` before it for another architecture.
        disk: A size, like ``memory``. Default: no requirement.

    Raises:
        ConfigurationError: A value has another form.

    Example:
        ``Resources(gpu="A100:40GB:2", memory="64GB..")``

    Source: the documented API, "Resources"; PROTOCOL 2.4.6, 3.2.
    """

    gpu: GPU | StrictStr | StrictInt | None = None
    memory: int | str | None = None
    shm_size: int | str | None = None
    cpu: int | str | None = None
    disk: int | str | None = None

    @field_validator("gpu", mode="before")
    @classmethod
    def _read_gpu(cls, value: Any) -> Any:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return GPU.model_validate(parse_gpu(value))
        return GPU.model_validate(value) if isinstance(value, Mapping) else value

    @field_validator("memory", "shm_size", "disk")
    @classmethod
    def _check_size(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _SIZE, 'a size such as "24GB", or a range such as "24GB..80GB"')

    @field_validator("cpu")
    @classmethod
    def _check_cpu(cls, value: int | str | None) -> int | str | None:
        count = _ARCHITECTURE.sub("", value) if isinstance(value, str) else value
        if count != "" or value == "":
            _check_range(count, _COUNT, 'a whole number such as 4, or a range such as "4..16"')
        return value
