"""The options of a submission beside its configuration, each declared here once.

Beside them are the checks of the values that callers pass: seconds, durations, choices, functions.

There are three layers, because two callers cannot take all options as they are. ``submit`` has the parameters
of the documented API, which may be passed by position, so it unpacks only ``KeywordOptions``. An engine whose
``env`` holds more than text, such as secrets, extends ``CommonOptions``. Everything else takes
``SubmitOptions``.

A new option belongs in ``KeywordOptions``: every client, Prefect's tasks, and the tests of all the places
that spell their own follow from it. ``CONTRIBUTING.md`` has the recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from urllib.parse import urlsplit

from dstack_core.errors import ConfigurationError
from dstack_core.models.debug import Hold

if TYPE_CHECKING:
    from dstack_core.models.profiles import Profile, RetryPolicy
    from dstack_core.models.resources import Resources
    from dstack_core.models.statuses import SpotPolicy
    from dstack_core.models.survive import Survive


# Seconds. Longer than a weekend is a machine that was forgotten.
_LONGEST_HOLD = 7 * 86400


class KeywordOptions(TypedDict, total=False):
    """The options that ``submit`` takes by keyword only."""

    args: Sequence[str] | None
    """The arguments that replace ``${{ run.args }}`` in commands, each quoted for the shell. Default:
    none.
    """
    profile: str | Profile | None
    """The name of a profile, or a ``Profile``. Default: the one marked ``default: true``, as ``load_profile``
    finds it in the ``repo_dir``, else the current directory, and the user's own.
    """
    reports: bool | None
    """Whether the run gets ``$DSTACK_RESULT_FILE``, whose content becomes its result, and the Python module
    ``dstack_report`` (servers from 0.19.17 on): a command before those of a task. Default: False, the
    configuration is sent as it is.
    """
    debug_on_failure: int | str | None
    """How long the container is held after the commands of a task have failed, for a person who opens a shell
    in it: seconds or ``"30m"``. For every follower the run has failed at once. Default: not at all.
    """

    survive: Survive | Mapping[str, Any] | int | str | bool | None
    """What the run survives instead of ending: a ``Survive``, a mapping of its fields, or only for how long
    in all, seconds or ``"4h"``. A spot machine that is taken away, and no capacity, then begin another
    attempt of the same run. Not together with ``retry_policy``. Default: nothing.
    """
    max_cost: float | None
    """The most that the run may cost in all, in USD: each process that follows the run stops it when the
    server's count reaches it. For the time without a follower, the server gets a ``max_duration``: as long as
    the money lasts at the highest price on offer. Default: no limit.
    """
    tags: Mapping[str, str] | Literal[False] | None
    """Tags that the run's machine gets at its cloud, by which a bill can be grouped (servers from 0.19.5 on).
    A key that the configuration or the profile has keeps its value there. False also leaves out the client's
    ``default_tags``. Default: none of its own.
    """


class CommonOptions(KeywordOptions, total=False):
    """The options that mean the same to every engine: all but ``env``."""

    resources: Resources | Mapping[str, Any] | str | int | None
    """``Resources``, whose numbers are minimums; or a mapping, or a GPU in its short form (``"24GB.."``,
    ``"A100:40GB:2"``, 1), with the same meaning as in YAML. They replace those of the configuration. Default:
    those of the configuration.
    """
    spot_policy: SpotPolicy | str | None
    """``SpotPolicy``, ``"spot"``, ``"on-demand"`` or ``"auto"``. Default: the configuration's, else the
    server's choice.
    """
    retry_policy: RetryPolicy | Mapping[str, Any] | bool | None
    """A ``RetryPolicy``: whether and how long to wait for capacity; or True, False or a mapping, with the
    same meaning as ``retry`` in YAML. Default: the configuration's.
    """
    max_duration: int | str | None
    """The duration after which the run is stopped: seconds, ``"2h"`` or ``"off"``. Default: the
    configuration's.
    """
    max_price: float | None
    """The highest price, in USD per hour. Default: the configuration's, else no limit."""
    working_dir: str | None
    """Where commands start: relative to the code's directory, absolute, or ``~/x``. Default: the
    configuration's, else the code's directory, else the image's own.
    """
    backends: list[str] | None
    """The only backends to take machines from. Default: the configuration's, else all of the project's."""


class SubmitOptions(CommonOptions, total=False):
    """All options of ``plan``, ``submit`` and ``apply``; None for one is the same as leaving it out."""

    env: Mapping[str, str] | None
    """Values for the names in the configuration's ``env`` that have none; it also replaces values and adds
    variables. Names that are still without a value get it from the environment of this process. Default:
    none.
    """


def check_options(
    given: Mapping[str, object], known: frozenset[str] | None = None, own: Iterable[str] = ()
) -> None:
    """Raise ``TypeError`` for names that are not options.

    Args:
        given: The options by name.
        known: The names to accept. Default: those of ``SubmitOptions``.
        own: Names of the caller's own parameters, which the error shows as well.

    Raises:
        TypeError: Some names are not among them; it names these and those to choose from.
    """
    names = SubmitOptions.__optional_keys__ if known is None else known
    if unknown := sorted(set(given) - names):
        from difflib import get_close_matches

        choices = sorted({*names, *own})
        close = get_close_matches(unknown[0], choices, 1)
        shown = ", ".join(unknown)
        raise TypeError(
            f"{shown}: expected one of the options {', '.join(choices)}, got {shown}. "
            + (f"Did you mean {close[0]}?" if close else "Check the spelling.")
        )


def check_seconds(name: str, value: Any, *, least: float = 0.0, above: bool = False) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is None or a number of seconds in range.

    Args:
        name: The parameter, for the error.
        value: The value to check.
        least: The smallest number of seconds to accept.
        above: Whether the value must be greater than ``least``.
    """
    if value is None:
        return
    # True is an int in Python, and every comparison with NaN is false.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or value < least or (above and value == least):
        unit = "second" if least == 1 else "seconds"
        wanted = f"more than {least:g} {unit}" if above else f"{least:g} {unit} or more"
        raise ConfigurationError(f"{name}: expected {wanted}, got {value!r}.")


def check_flags(**given: object) -> None:
    """Raise ``ConfigurationError`` unless each value is True or False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name}: expected True or False, got {value!r}.")


def check_address(name: str, given: str) -> str:
    """Return the address of a server.

    Raises ``ConfigurationError`` for one that has no host, a wrong port, blanks, a query or fragment, or a
    user and password.
    """
    try:
        parts = urlsplit(given)
        is_wrong = not parts.hostname or parts.port == 0 or any(map(str.isspace, given))
        has_user = "@" in parts.netloc
    except ValueError:
        is_wrong, has_user = True, "@" in given
    if has_user:
        raise ConfigurationError(
            f"{name}: expected an address without a user and password, got one with them. Remove them: "
            "everybody who sees a link to a run would see them."
        )
    if is_wrong:
        raise ConfigurationError(
            f"{name}: expected an address such as https://dstack.example.com, got {given!r}. Correct the "
            "host or the port."
        )
    if "?" in given or "#" in given:
        # The path of a page is added at the end.
        raise ConfigurationError(
            f"{name}: expected an address that ends with its path, got {given!r}. Remove what begins with "
            "? or #."
        )
    return given


def check_callable(name: str, value: Any) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name}: expected a function, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"{name}: expected one of {known}, got {value!r}.")


# The server's own rule for fleets and volumes (fleets/apply, volumes/create).
_RESOURCE_NAME = re.compile(r"[a-z][a-z0-9-]{1,40}")


def check_resource_name(name: Any, kind: str) -> str:
    """Return the name of a fleet or volume.

    Args:
        name: The name to check.
        kind: ``"fleet"`` or ``"volume"``, for the error.

    Raises:
        ConfigurationError: No server accepts the name.

    Example:
        ``check_resource_name("train", "fleet")``
    """
    if not isinstance(name, str) or not _RESOURCE_NAME.fullmatch(name):
        raise ConfigurationError(
            f"name: expected 2 to 41 lower-case letters, digits and dashes, a letter first, for the {kind}, "
            f"got {name!r}."
        )
    return name


_DURATION = re.compile(r"\d+ *[smhdw]?")
_WHOLE = re.compile(r"-?\d+")


def check_duration(value: int | str | bool | None, *, off: bool = False) -> int | str | bool | None:
    """Return ``value`` if it is a duration: seconds above 0, or a text such as ``"2h"``.

    With ``off`` also ``"off"`` and False are accepted, for no limit. Raises ``ValueError``. Source:
    PROTOCOL 3.2.
    """
    if value is None or (off and (value == "off" or value is False)):
        return value
    if isinstance(value, str):
        fine = _DURATION.fullmatch(value) is not None
    else:
        fine = not isinstance(value, bool) and value > 0
    if not fine:
        ways = '"2h" or "off"' if off else '"2h" or "3d"'
        raise ValueError(f"expected seconds above 0, or a string such as {ways}, got {value!r}")
    return value


_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def duration_seconds(value: int | str) -> float:
    """Return a duration, such as 90, ``"90"`` or ``"2h"``, in seconds. Raises ``ValueError``."""
    check_duration(value)
    text = str(value)
    number, unit = (text, "s") if text.isdecimal() else (text[:-1], text[-1])
    return float(number) * _UNIT_SECONDS[unit]


def read_duration(value: Any, *, below_zero: bool = False) -> Any:
    """Return a duration as configurations may have it: also 0, a fraction, ``"off"``, False and True.

    True means the server's default. With ``below_zero`` every negative number means no limit, the older way
    to write it. Raises ``ValueError``. Source: dstack 0.22.5's own client.
    """
    if value is None or isinstance(value, bool) or value == "off":
        return value
    # As dstack's own client, which drops the fraction.
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    number = int(value) if isinstance(value, str) and _WHOLE.fullmatch(value) else value
    if isinstance(number, int):
        fine = number >= 0 or below_zero
    else:
        fine = isinstance(value, str) and _DURATION.fullmatch(value) is not None
    if not fine:
        raise ValueError(f'expected seconds, or a string such as "2h" or "off", got {value!r}')
    return value


def hold_seconds(option: object) -> int | None:
    """Return the option ``debug_on_failure`` in seconds, None without one.

    Raises ``ConfigurationError`` for anything but seconds above 0, or a duration such as ``"30m"``.
    """
    if isinstance(option, Hold):
        option = option.duration
    if option is None or option is False:
        return None
    try:
        if isinstance(option, bool) or not isinstance(option, int | str):
            raise ValueError
        seconds = int(duration_seconds(option))
    except (ValueError, KeyError):
        seconds = 0
    if not 0 < seconds <= _LONGEST_HOLD:
        raise ConfigurationError(
            f'debug_on_failure: expected seconds above 0, or a string such as "30m" or "2h", at most 7 days, '
            f"got {option!r}."
        )
    return seconds
