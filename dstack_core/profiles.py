"""Find a profile: the ``profiles.yml`` beside the code, and the user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_core.errors import ConfigurationError
from dstack_core.models.profiles import Profile

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
        home: Whether what belongs to the user counts: ``~/.dstack/profiles.yml``, ``DSTACK_PROFILE``, and
            ``DSTACK_NO_PROFILE``, which turns profiles off unless one is named.

    Returns:
        The profile; without a name and without a default an empty one.

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
        for profile in _read(place, needed=file is not None):
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


def _read(path: Path, *, needed: bool) -> list[Profile]:
    if not path.is_file() and path.with_suffix(".yaml").is_file():
        path = path.with_suffix(".yaml")
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        if needed:
            raise ConfigurationError(f"profiles: expected a file at {path}, got none.") from None
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"profiles: {path} cannot be read ({error}).") from None
    items = _items(text, path)
    try:
        return [Profile.model_validate(item) for item in items]
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def _items(text: str, path: Path) -> list[Any]:
    # Only those who have such a file wait for the import.
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
