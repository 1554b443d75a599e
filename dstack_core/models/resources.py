"""The hardware a run asks for."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from dstack_core.models.base import Model

_SIZE = re.compile(r"(\d+(\.\d+)?)\s*(MB|GB|TB)?", re.IGNORECASE)
_COUNT = re.compile(r"\d+")


def _check_range(value: int | str | None, part: re.Pattern[str], examples: str) -> int | str | None:
    if value is None:
        return None
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative; write {examples}")
        return value
    ends = [end.strip() for end in value.split("..")]
    fine = len(ends) <= 2 and any(ends) and all(part.fullmatch(end) for end in ends if end)
    if not fine:
        raise ValueError(f"{value!r} is not understood; write {examples}")
    return value


class GPU(Model):
    """Ask for GPUs; every number is a minimum.

    ``name`` (str or list of str): e.g. ``"A100"``. ``count`` (int, or a range such as ``"2..4"``).
    ``memory`` (VRAM each): a str with a unit such as ``"24GB"``, a range ``"24GB..80GB"``, or an int
    in MB. Raises ``ConfigurationError``. Source: the documented API, "GPU"; PROTOCOL 3.2.
    """

    name: str | list[str] | None = None
    count: int | str | None = None
    memory: int | str | None = None

    @field_validator("count")
    @classmethod
    def _check_count(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _COUNT, 'a whole number such as 2, or a range such as "2..4"')

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _SIZE, 'a size such as "24GB", or a range such as "24GB..80GB"')


class Resources(Model):
    """Ask for hardware; every number is a minimum.

    ``gpu`` (``GPU``), ``memory`` and ``shm_size``: a str with a unit such as ``"24GB"`` or an int in
    MB; ``cpu``: a whole number or a range; ``disk``: a size. No disk is asked for when none is given.
    Raises ``ConfigurationError``. Source: the documented API, "Resources"; PROTOCOL 2.4.6, 3.2.
    """

    gpu: GPU | None = None
    memory: int | str | None = None
    shm_size: int | str | None = None
    cpu: int | str | None = None
    disk: int | str | None = Field(default=None)

    @field_validator("memory", "shm_size", "disk")
    @classmethod
    def _check_size(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _SIZE, 'a size such as "24GB", or a range such as "24GB..80GB"')

    @field_validator("cpu")
    @classmethod
    def _check_cpu(cls, value: int | str | None) -> int | str | None:
        return _check_range(value, _COUNT, 'a whole number such as 4, or a range such as "4..16"')
