"""The files of this machine that a run gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import ConfigDict, ValidationInfo, field_validator, model_validator

from dstack_core.models.base import Model


class FileMapping(Model):
    """A file or a directory of this machine, and its path in the container; an item of ``files``.

    The short form is ``"local_path:path"``, or ``"path"`` if both are the same.

    Attributes:
        local_path: Relative to the folder of the ``.dstack.yml`` it was read from, else to the current
            directory.
        path: Relative to the run's working directory; ``~`` is the home of its user.

    Source: dstack's own configuration reference, "files"; PROTOCOL 1.3.
    """

    # YAML reads a name such as 2024 as a number.
    model_config = ConfigDict(coerce_numbers_to_str=True)
    _form = 'a path, "local_path:path", or a mapping of local_path and path'

    local_path: str
    path: str

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            local_path, _, path = value.partition(":")
            if ":" in path:
                raise ValueError(
                    f"expected at most one colon, got {value!r}. Write {{local_path: ..., path: ...}}"
                )
            if not local_path:
                raise ValueError(f"expected the path of a file or a directory, got {value!r}")
            return {"local_path": local_path, "path": path or local_path}
        if isinstance(value, Mapping) and isinstance(value.get("local_path"), str):
            return {"path": value["local_path"], **value}
        return value

    @field_validator("local_path", "path")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("expected a path, got ''")
        return value

    @field_validator("local_path")
    @classmethod
    def _below_its_file(cls, value: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get("folder")
        return value if folder is None or value.startswith("~") else str(PurePath(folder) / value)
