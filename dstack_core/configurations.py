"""Reading run configurations and profiles from YAML files, texts and dicts.

Every function that takes a configuration takes any of these forms, ``ConfigurationLike``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, Service, Task
from dstack_core.models.fleets import FleetConfiguration
from dstack_core.models.profiles import Profile
from dstack_core.models.volumes import VolumeConfiguration

ConfigurationLike: TypeAlias = Configuration | Mapping[str, Any] | str | os.PathLike[str]
"""A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml`` file."""

FleetLike: TypeAlias = FleetConfiguration | Mapping[str, Any] | str | os.PathLike[str]
"""A ``FleetConfiguration``, a dict as in YAML, or the path of a ``type: fleet`` file."""

VolumeLike: TypeAlias = VolumeConfiguration | Mapping[str, Any] | str | os.PathLike[str]
"""A ``VolumeConfiguration``, a dict as in YAML, or the path of a ``type: volume`` file."""

OtherT = TypeVar("OtherT", FleetConfiguration, VolumeConfiguration)

# YAML text instead of a path: several lines, or a key. No file has such a name.
_YAML = re.compile(r".*\n|\s*[\w-]+:(\s|$)", re.ASCII)

_TYPES: dict[str, type[Configuration]] = {"task": Task, "service": Service, "dev-environment": Configuration}


def load_configuration(source: ConfigurationLike) -> Configuration:
    """Return the configuration that ``source`` is, or names as a path.

    Args:
        source: A ``Task``, a ``Service``, a dict as in YAML, or the path of a ``.dstack.yml``. Relative paths
            in ``files`` and ``repos`` are relative to the folder of that file; those of a dict or a ``Task``
            to the current directory.

    Returns:
        The configuration: a ``Task``, a ``Service``, or a ``Configuration`` of another type.

    Raises:
        ConfigurationError: The file cannot be read, is not a mapping, or a field is wrong.

    Example:
        ``task = load_configuration("train.dstack.yml")``
    """
    if isinstance(source, Configuration):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, "configuration")
    if isinstance(source, str | os.PathLike) and os.fspath(source):
        path = Path(source).expanduser()
        return _from_mapping(_read(path), str(path), path.absolute().parent)
    raise ConfigurationError(
        "configuration: expected a Task, a Service, a dict or the path of a .dstack.yml, got "
        f"{repr(source) if isinstance(source, str | int | float | None) else type(source).__name__}."
    )


def parse_configuration(text: str, name: str = "configuration") -> Configuration:
    """Return the configuration that is written as YAML in ``text``.

    Args:
        text: A YAML document, as in a ``.dstack.yml``.
        name: What errors call the text, such as the name of the parameter it was passed as.

    Raises:
        ConfigurationError: The text is not a YAML mapping, or a field is wrong.

    Example:
        ``task = parse_configuration("type: task\\ncommands: [python train.py]")``
    """
    return _from_mapping(_parse(text, name), name)


def load_fleet(source: FleetLike) -> FleetConfiguration:
    """Return the fleet's configuration that ``source`` is, or names as a path.

    Raises ``ConfigurationError``.
    """
    return _load_other(source, FleetConfiguration)


def load_volume(source: VolumeLike) -> VolumeConfiguration:
    """Return the volume's configuration that ``source`` is, or names as a path.

    Raises ``ConfigurationError``.
    """
    return _load_other(source, VolumeConfiguration)


def _load_other(source: Any, model: type[OtherT]) -> OtherT:
    loaded = _read_other(source, model)
    loaded.check()
    return loaded


def _read_other(source: Any, model: type[OtherT]) -> OtherT:
    kind = model.model_fields["type"].default
    if isinstance(source, model):
        return source
    name = "configuration"
    if isinstance(source, str | os.PathLike) and os.fspath(source):
        name = str(Path(source).expanduser())
        source = _read(Path(name))
    if not isinstance(source, Mapping):
        got = repr(source) if isinstance(source, str | int | float | None) else type(source).__name__
        raise ConfigurationError(
            f"{_subject(name)}: expected a {model.__name__}, a mapping or the path of a file with "
            f"`type: {kind}`, got {got}."
        )
    if source.get("type", kind) != kind:
        raise ConfigurationError(f"{_subject(name)}: expected `type: {kind}`, got {source['type']!r}.")
    return model.model_validate(dict(source))


def _read(path: Path) -> Any:
    if _YAML.match(str(path)) and not path.exists():
        raise ConfigurationError(
            "configuration: expected the path of a .dstack.yml or a dict, got YAML text. "
            "Pass dstack_core.parse_configuration(text)."
        )
    try:
        return _parse(path.read_text(), str(path))
    except IsADirectoryError:
        raise ConfigurationError(f"configuration: expected a file, got the directory {path}.") from None
    except OSError as error:
        raise ConfigurationError(f"configuration: {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"configuration: {path}: expected a text file, got a binary one.") from None


def _parse(text: str, name: str) -> Any:
    # Only a caller that reads YAML pays for the import.
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "expected YAML, got something else"
        if problem == "but found another document":
            problem = "expected one document, got another one here."
        raise ConfigurationError(f"{_subject(name)}{line}: {problem}") from None


def _from_mapping(data: Any, name: str, folder: Path | None = None) -> Configuration:
    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{_subject(name)}: expected a mapping such as `type: task`, got a {type(data).__name__}."
        )
    kind = data.get("type")
    model = _TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        known = ", ".join(f"`type: {each}`" for each in _TYPES)
        got = "none" if kind is None else f"{kind!r}"
        raise ConfigurationError(f"{_subject(name)}: expected one of {known}, got {got}.")
    return model.model_validate(data, context={"folder": folder})


def _subject(name: str) -> str:
    """Return the beginning of an error: the parameter, and the file if there is one."""
    return name if name == "configuration" else f"configuration: {name}"


_ON, _OFF = ("1", "true", "on"), ("", "0", "false", "off")


def load_profile(
    name: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    home: bool = True,
) -> Profile:
    """Return the profile of that name, or the default one, from the first file that has it.

    Args:
        name: The profile's name. None: with ``home`` the one that ``DSTACK_PROFILE`` names, else the one
            marked ``default: true``, else an empty profile.
        folder: The directory whose ``.dstack/profiles.yml`` is read first; None: no such file.
        file: The path of a file of profiles, read instead of all others.
        home: Whether to use the user's own settings: ``~/.dstack/profiles.yml``, ``DSTACK_PROFILE``, and
            ``DSTACK_NO_PROFILE``, which turns profiles off unless one is named.

    Returns:
        The profile. Without a name and without a default it is empty.

    Raises:
        ConfigurationError: No file has a profile of that name, or a file is wrong.

    Example:
        ``client.runs.submit("train.dstack.yml", profile=load_profile("spot", "/repo", home=False))``
    """
    if name is None and home:
        if _is_on("DSTACK_NO_PROFILE"):
            return Profile(name="no-profile")
        name = os.environ.get("DSTACK_PROFILE") or None
    places = [Path(file).expanduser()] if file is not None else _places(folder, home)
    known: list[str] = []
    for place in places:
        for profile in _read_profiles(place, needed=file is not None):
            if profile.name == name or (name is None and profile.default):
                return profile
            known.append(profile.name)
    if name is None:
        return Profile()
    where = " and ".join(map(str, places)) or "no file"
    there = ", ".join(map(repr, known)) or "none"
    raise ConfigurationError(
        f"profile: expected one of those in {where} ({there}), got {name!r}. "
        "Correct the name, or add the profile."
    )


def _places(folder: str | os.PathLike[str] | None, home: bool) -> list[Path]:
    folders = [] if folder is None else [Path(folder).expanduser()]
    if home:
        folders.append(Path.home())
    return [each / ".dstack" / "profiles.yml" for each in folders]


def _read_profiles(path: Path, *, needed: bool) -> list[Profile]:
    if not path.is_file() and path.with_suffix(".yaml").is_file():
        path = path.with_suffix(".yaml")
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        if needed:
            raise ConfigurationError(f"profiles: expected a file at {path}, got none.") from None
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"profiles: could not read {path}: {error}.") from None
    items = _items(text, path)
    try:
        return [Profile.model_validate(item) for item in items]
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def _items(text: str, path: Path) -> list[Any]:
    # Only a caller that reads such a file pays for the import.
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"profiles: {path}{where}: expected YAML, got something else.") from None
    items = content.get("profiles") if isinstance(content, Mapping) else None
    if not isinstance(items, list):
        raise ConfigurationError(f"profiles: expected a list of `profiles` in {path}, got none.")
    return items


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable, "").lower()
    if value not in (*_ON, *_OFF):
        raise ConfigurationError(f'{variable}: expected "1" or "0", got {value!r}.')
    return value in _ON


def check_ends(
    configuration: Configuration, max_duration: int | str | bool | None = None, profile: Profile | None = None
) -> None:
    """Raise ``ConfigurationError`` if the run of a configuration would not end by itself.

    An engine's task waits for the end of its run, so it would never finish.

    Args:
        configuration: What ``load_configuration`` returned.
        max_duration: The limit that is passed to ``submit``: seconds, ``"2h"`` or ``"off"``. None: that of
            the configuration, else of the profile.
        profile: The profile that is passed to ``submit``, or None.

    Raises:
        ConfigurationError: The configuration or the profile has a ``schedule``, so that the server starts it
            again and again, or it is a dev environment without ``max_duration``.

    Example:
        ``check_ends(load_configuration("train.dstack.yml"), max_duration="2h")``
    """
    settings = [configuration] if profile is None else [configuration, profile]
    if any(each.schedule for each in settings):
        raise ConfigurationError(
            "schedule: expected a configuration that ends, got one that the server starts again and again. "
            "Drop schedule, and set the schedule where this is called from."
        )
    limits = [max_duration, *(each.max_duration for each in settings)]
    limit = next((each for each in limits if each is not None and each is not True), None)
    if configuration.type == "dev-environment" and (limit is None or limit is False or limit == "off"):
        raise ConfigurationError(
            "configuration: expected a configuration that ends, got a dev-environment without max_duration. "
            'Use `type: task`, or set max_duration, such as "2h", at which the run ends as failed.'
        )
