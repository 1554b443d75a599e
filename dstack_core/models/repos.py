"""The Git repository that a configuration names."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from dstack_core.models.base import Model

# An address with a scheme may have a login and a port before its path, so a colon separates only after these.
_URL = re.compile(
    r"(?P<url>[a-z][a-z+.-]*://(?:[^/@]*@)?(?:\[[^\]/]*\]|[^/:]*)(?::\d+(?=/|$))?(?:/[^:]*)?)(?::(?P<path>.*))?",
    re.IGNORECASE,
)
_SCP = re.compile(r"(?P<url>[^/@:]+@(?:\[[^\]/]*\]|[^/:]+):[^:]+)(?::(?P<path>.*))?")


class RepoMapping(Model):
    """The repository that a run starts from; the one item of ``repos``.

    The short form is ``"local_path:path"`` or ``"url:path"``, or either without the path. Servers older than
    0.20 put the code into ``/workflow`` and have neither ``path`` nor ``if_exists``.

    Attributes:
        local_path: A directory of this machine, treated like the one of ``from_config(repo_dir=...)``.
            Relative to the folder of the ``.dstack.yml`` it was read from, else to the current directory.
        url: The address of a Git repository, instead of ``local_path``.
        branch, hash: The branch and the commit of ``url``. Default: the newest commit of the default branch.
        path: Where the code lies in the container, relative to the working directory; ``~`` is the home of
            the run's user. Default: the working directory itself.
        if_exists: What to do if files lie there already: ``"error"`` (the default) or ``"skip"``.

    Source: dstack's own configuration reference, "repos".
    """

    _form = "a path, an address, or a mapping of local_path or url"

    local_path: str | None = None
    url: str | None = None
    branch: str | None = None
    hash: str | None = None
    path: str = "."
    if_exists: Literal["error", "skip"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = _URL.fullmatch(value) or _SCP.fullmatch(value)
        if found:
            return {"url": found["url"], "path": found["path"] or "."}
        local_path, _, path = value.partition(":")
        if ":" in path:
            shown = _without_login(value)
            raise ValueError(
                f"repos: expected local_path:path or url:path, got {shown!r}. Write "
                "{local_path: ..., path: ...} or {url: ..., path: ...}"
            )
        return {"local_path": local_path, "path": path or "."}

    @model_validator(mode="after")
    def _one_place(self) -> RepoMapping:
        if bool(self.local_path) == bool(self.url):
            raise ValueError(
                f"repos: expected either local_path or url, got {'both' if self.url else 'neither'}"
            )
        return self

    @field_validator("path")
    @classmethod
    def _known_home(cls, value: str) -> str:
        if value.startswith("~") and value != "~" and not value.startswith("~/"):
            raise ValueError(
                f"repos: expected a path such as ~/x, got {value!r}. A run knows the home of its "
                "own user only"
            )
        return value or "."

    @field_validator("local_path")
    @classmethod
    def _below_its_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get("folder")
        if folder is None or not value or value.startswith("~"):
            return value
        return str(PurePath(folder) / value)

    def __repr_args__(self) -> Any:
        """Show the address without a login, which may be a token."""
        for name, value in super().__repr_args__():
            yield name, _without_login(value) if name == "url" and value else value


def _without_login(address: str) -> str:
    return re.sub(r"://[^/@]+@", "://***@", address)
