"""The search for server, project and token: arguments, then the environment, then ``~/.dstack/config.yml``.

In ``from_config`` the address and the token always come from the same source; only the project's name may
come from another one. No message quotes a line of the file, which holds tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstack_core.errors import ConfigurationError, ProjectNotConfiguredError
from dstack_core.models.options import check_address

_WAYS = (
    "Pass server_url=, project_name= and user_token=, set DSTACK_SERVER_URL, DSTACK_PROJECT and "
    "DSTACK_TOKEN, or run `dstack project add` to write ~/.dstack/config.yml."
)

_EXPECTED = {
    "DSTACK_SERVER_URL": "the address of a dstack server",
    "DSTACK_PROJECT": "the name of a project",
    "DSTACK_TOKEN": "the token of a user of the server",
}
_UI_URL = "DSTACK_UI_URL"
_VARIABLES = dict(zip(("server_url", "project_name", "user_token"), _EXPECTED, strict=True))


@dataclass(frozen=True, slots=True)
class Target:
    """The server, the project and the token of a client; the token stays out of the repr."""

    server_url: str
    project: str
    token: str = field(repr=False)


def from_arguments(server_url: str | None, project_name: str | None, user_token: str | None) -> Target:
    """Return the target that the arguments name; what is left out comes from the environment.

    Reads ``DSTACK_SERVER_URL``, ``DSTACK_PROJECT`` and ``DSTACK_TOKEN``. Raises
    ``ProjectNotConfiguredError`` for what neither names, ``ConfigurationError`` for an address without a
    scheme.
    """
    arguments = zip(_VARIABLES, (server_url, project_name, user_token), strict=True)
    given = {name: value or os.environ.get(_VARIABLES[name]) for name, value in arguments}
    missing = [name for name, value in given.items() if not value]
    if missing:
        _refuse_empty([_VARIABLES[name] for name in missing])
        raise ProjectNotConfiguredError(
            f"{' and '.join(missing)}: expected an argument or an environment variable, got none. {_WAYS}"
        )
    return _target(*(value or "" for value in given.values()))


def from_config(
    server_url: str | None, project_name: str | None, user_token: str | None, *, home: Path | None = None
) -> Target:
    """Return the target from the arguments, else the environment, else the configuration file.

    ``server_url`` and ``user_token`` go together and need a project, as documented. With
    ``DSTACK_SERVER_URL`` and ``DSTACK_TOKEN`` set the file is not read; ``DSTACK_PROJECT`` also chooses
    a project of the file. Raises ``ProjectNotConfiguredError`` and ``ConfigurationError``. Source: the
    documented API, "from_config()"; PROTOCOL 3.1.
    """
    if server_url or user_token:
        if not (server_url and user_token):
            given, other = ("server_url", "user_token") if server_url else ("user_token", "server_url")
            raise ConfigurationError(
                f"server_url and user_token: expected both, got only {given}. Pass {other} and "
                "project_name too."
            )
        return from_arguments(server_url, project_name, user_token)
    project_name = project_name or os.environ.get("DSTACK_PROJECT")
    if os.environ.get("DSTACK_SERVER_URL") and os.environ.get("DSTACK_TOKEN"):
        return from_arguments(None, project_name, None)
    path = _config_file(home or Path.home())
    project = _choose(_projects(path), project_name, path)
    try:
        return _target(str(project["url"]), str(project["name"]), str(project["token"]))
    except KeyError as error:
        raise ConfigurationError(
            f"{path}: expected a {error.args[0]} for the project {project.get('name')!r}, got none. Add it "
            "to the file."
        ) from None


def ui_url(given: str | None, *, of_environment: bool) -> str | None:
    """Return the server's address for browsers, None for that of the server itself.

    ``of_environment``: whether ``DSTACK_UI_URL`` counts, which belongs to a server that no argument names.
    Raises ``ConfigurationError`` for a wrong address, and one with a password, which every link would show.
    """
    name = "ui_url"
    if not given and of_environment:
        name, given = _UI_URL, os.environ.get(_UI_URL)
    if given and not given.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"{name}: expected an address such as https://dstack.example.com, got {given!r}. Add the scheme."
        )
    return check_address(name, given).rstrip("/") if given else None


def _target(server_url: str, project: str, token: str) -> Target:
    if not server_url.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"server_url: expected an address such as http://localhost:3000, got {server_url!r}. Add the "
            "scheme."
        )
    return Target(server_url.rstrip("/"), project, token)


def find_config_file(home: Path) -> Path | None:
    """Return the configuration file of a user, None without one."""
    places = [home / ".dstack" / name for name in ("config.yml", "config.yaml")]
    return next((place for place in places if place.is_file()), None)


def _config_file(home: Path) -> Path:
    found = find_config_file(home)
    if found is None:
        _refuse_empty(_EXPECTED)
        raise ProjectNotConfiguredError(
            f"config: expected a file {home / '.dstack' / 'config.yml'} (or config.yaml), got none. {_WAYS}"
        )
    return found


def _refuse_empty(variables: Iterable[str]) -> None:
    """Raise ``ProjectNotConfiguredError`` for variables that are set, but empty."""
    empty = [name for name in variables if os.environ.get(name) == ""]
    if empty:
        wrong = " ".join(f"{name}: expected {_EXPECTED[name]}, got an empty value." for name in empty)
        raise ProjectNotConfiguredError(f"{wrong} Set it where this process is started.")


def _projects(path: Path) -> list[Mapping[str, Any]]:
    # Only a client that reads such a file pays for the import.
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        # The parser's text quotes the line, and the line may hold the token.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(
            f"{path}{where}: expected YAML, got something else. Correct the file."
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}.") from None
    projects = content.get("projects") if isinstance(content, Mapping) else None
    if not isinstance(projects, list) or not all(isinstance(project, Mapping) for project in projects):
        raise ConfigurationError(f"{path}: expected a list of `projects`, got none. {_WAYS}")
    return projects


def _choose(projects: list[Mapping[str, Any]], name: str | None, path: Path) -> Mapping[str, Any]:
    known = ", ".join(str(project.get("name")) for project in projects) or "none"
    if name is not None:
        for project in projects:
            if project.get("name") == name:
                return project
        raise ProjectNotConfiguredError(
            f"project_name: expected a project of {path} ({known}), got {name!r}. {_WAYS}"
        )
    default = next((project for project in projects if project.get("default")), None)
    if default is None:
        raise ProjectNotConfiguredError(
            f"{path}: expected a default project, got none (projects: {known}). Pass project_name= or set "
            "DSTACK_PROJECT."
        )
    return default
