"""The Git repository a configuration names."""

from __future__ import annotations

import re
from pathlib import PurePath, PurePosixPath
from typing import Any

from pydantic import ValidationInfo, field_validator, model_validator

from dstack_core.models.base import Model

_CODE_DIRS = (".", "/workflow")
_URL = re.compile(r"[a-z+]+://.*|[^/@:]+@[^/:]+:.*")


class RepoMapping(Model):
    """Name the repository a run starts from; the one item of ``repos``.

    Either ``local_path`` (str; relative to the folder of the ``.dstack.yml`` it was read from, else to the
    current directory), treated as ``from_config(repo_dir=...)`` treats its own, or ``url`` (str) with
    ``branch`` and ``hash`` (str), by default the newest commit of the default branch. The code lies in
    ``/workflow``, so ``path`` may say nothing else. Written short as the path or the address alone.
    Source: dstack's own configuration reference, "repos".
    """

    local_path: str | None = None
    url: str | None = None
    branch: str | None = None
    hash: str | None = None
    path: str = "."

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"url" if _URL.fullmatch(value) else "local_path": value}
        return value

    @model_validator(mode="after")
    def _one_place(self) -> RepoMapping:
        if bool(self.local_path) == bool(self.url):
            raise ValueError("repos: an item has either a local_path or a url")
        if self.local_path and (self.branch or self.hash):
            raise ValueError(
                "repos: branch and hash go with a url; a local_path is taken as it is checked out"
            )
        return self

    @field_validator("path")
    @classmethod
    def _where_code_lies(cls, value: str) -> str:
        if str(PurePosixPath(value)) not in _CODE_DIRS:
            raise ValueError(
                f"repos: path {value!r} is not supported; the code lies in {_CODE_DIRS[1]}, drop path"
            )
        return value

    @field_validator("local_path")
    @classmethod
    def _below_its_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get("folder")
        if folder is None or not value or value.startswith("~"):
            return value
        return str(PurePath(folder) / value)

    def __repr_args__(self) -> Any:
        """Show the address without what may be a token in it."""
        for name, value in super().__repr_args__():
            yield name, re.sub(r"://[^/@]+@", "://***@", value) if name == "url" and value else value
