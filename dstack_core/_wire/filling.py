"""Fill in what a configuration leaves to the place it is submitted from, as ``dstack apply`` does.

Names of ``env`` without a value get one, ``${{ env.NAME }}`` is filled in in ``registry_auth`` and
``probes``, and ``${{ run.args }}`` in commands. ``${{ secrets.NAME }}`` and the addresses of nodes are the
server's to fill in and stay as they are; any other reference is an error, since the server would pass it to
the command as text. ``$${{`` stands for the characters themselves.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dstack_core._wire.interpolation import ADDRESS, SECRET, Interpolator
from dstack_core._wire.survival import SURVIVE
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, RegistryAuth
from dstack_core.models.cost_limits import GUARD_VARIABLE, MAX_COST_VARIABLE

_ENV_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# The variables by which the limits of a run travel with it, and the options that set them.
_OPTIONS = {MAX_COST_VARIABLE: "max_cost", GUARD_VARIABLE: "max_cost", SURVIVE: "survive"}
RESULT_FILE = "DSTACK_RESULT_FILE"
_ENV, _SECRET = "${{ env.NAME }}", "${{ secrets.NAME }}"
_ENV_ADVICE = "Name a variable of env, or write $${{ to keep the text as it is."
_ARGS_ADVICE = "Use $NAME for a variable of env, or write $${{ to keep the text as it is."


def fill_in(
    configuration: Configuration,
    *,
    env: Mapping[str, str] | None,
    args: Sequence[str] | None,
    environ: Mapping[str, str],
) -> Configuration:
    """Return the configuration as it is sent; ``environ`` gives values to names that have none.

    Raises ``ConfigurationError`` for names without a value anywhere, all of them in one error, and for
    references that nothing fills in.
    """
    own = configuration.env if isinstance(configuration.env, Mapping) else {}
    filled = _with_values({**own, **_checked_env(env)}, environ)
    changes: dict[str, Any] = {"env": filled} if filled != own else {}
    values = {f"env.{name}": value for name, value in filled.items()}
    if configuration.registry_auth is not None:
        auth = configuration.registry_auth
        variables = Interpolator(values, (SECRET,), f"{_ENV} or {_SECRET}", _ENV_ADVICE, is_secret=True)
        changes["registry_auth"] = RegistryAuth(
            username=variables.fill(auth.username, "registry_auth.username"),
            password=variables.fill(auth.password, "registry_auth.password"),
        )
    probes = getattr(configuration, "probes", None)
    if probes:
        variables = Interpolator(values, (SECRET,), _ENV, _ENV_ADVICE, is_secret=True)
        changes["probes"] = [
            _probe(probe, variables, f"probes, item {number}") for number, probe in enumerate(probes, 1)
        ]
    # Arguments are quoted for the shell once, here: the reference stands in a command line.
    given = {"run.args": _joined(args)}
    arguments = Interpolator(given, (SECRET, ADDRESS), "${{ run.args }}", _ARGS_ADVICE)
    changes |= _with_commands(configuration, arguments)
    return configuration.model_copy(update=changes) if changes else configuration


def refuse_own_variables(env: Any, *, reports: bool) -> None:
    """Raise ``ConfigurationError`` if ``env`` has a variable that an option sets, with or without the option.

    It would be replaced, or read as if the option was given. ``reports``: the option of that name is set.
    """
    for name in env or ():
        if name in _OPTIONS:
            raise ConfigurationError(
                f"env: expected variables that no option sets, got {name}. Use the option {_OPTIONS[name]}, "
                "or choose another name."
            )
        if reports and name == RESULT_FILE:
            raise ConfigurationError(
                f"env: expected variables that no option sets, got {name}, which a run with reports gets. "
                "Leave it out, or pass reports=False."
            )


def _checked_env(env: Any) -> dict[str, str]:
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise ConfigurationError(
            f'env: expected a mapping such as {{"NAME": "value"}}, got a {type(env).__name__}.'
        )
    # No error shows a value: it may be a secret.
    for name, value in env.items():
        if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
            raise ConfigurationError(f"env: expected names of variables such as HF_TOKEN, got {name!r}.")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigurationError(f"env: expected a string for {name}, got a {type(value).__name__}.")
    return {name: str(value) for name, value in env.items()}


def _with_values(env: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, str]:
    filled = {name: environ.get(name) if value is None else value for name, value in env.items()}
    missing = [name for name, value in filled.items() if value is None]
    if missing:
        pairs = ", ".join(f'"{name}": ...' for name in missing)
        what, them = ("values", "them") if len(missing) > 1 else ("a value", "it")
        raise ConfigurationError(
            f"env: expected {what} for {', '.join(missing)}, got none. Pass env={{{pairs}}}, or set {them} "
            "in the environment of this process."
        )
    return {name: value for name, value in filled.items() if value is not None}


def _joined(args: Any) -> str:
    if args is None:
        return ""
    fine = isinstance(args, Sequence) and not isinstance(args, str | bytes)
    if not fine or any(isinstance(arg, bool) or not isinstance(arg, str | int | float) for arg in args):
        raise ConfigurationError(f'args: expected a list of strings such as ["--epochs", "3"], got {args!r}.')
    return shlex.join(map(str, args))


def _probe(probe: Mapping[str, Any], variables: Interpolator, where: str) -> dict[str, Any]:
    filled = dict(probe)
    for key in ("url", "body"):
        if isinstance(probe.get(key), str):
            filled[key] = variables.fill(probe[key], f"{where}, {key}")
    if isinstance(probe.get("headers"), Sequence):
        filled["headers"] = [
            {**header, "value": variables.fill(header["value"], f"{where}, headers")}
            if isinstance(header, Mapping) and isinstance(header.get("value"), str)
            else header
            for header in probe["headers"]
        ]
    return filled


def _with_commands(configuration: Configuration, arguments: Interpolator) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if configuration.commands and any("${{" in command for command in configuration.commands):
        changes["commands"] = _filled(configuration.commands, arguments, "commands")
    for key in ("groups", "replicas"):
        groups = getattr(configuration, key, None)
        if isinstance(groups, list | tuple):
            changes[key] = [
                {**group, "commands": _filled(group["commands"], arguments, f"{key}, commands")}
                if isinstance(group, Mapping) and isinstance(group.get("commands"), list)
                else group
                for group in groups
            ]
    return changes


def _filled(commands: Sequence[Any], arguments: Interpolator, where: str) -> list[Any]:
    return [
        arguments.fill(command, f"{where}, item {number}") if isinstance(command, str) else command
        for number, command in enumerate(commands, 1)
    ]


def takes_args(configuration: Configuration) -> bool:
    """Return whether a command of the configuration has ``${{ run.args }}``."""
    commands = list(configuration.commands or [])
    for key in ("groups", "replicas"):
        groups = getattr(configuration, key, None)
        if isinstance(groups, list | tuple):
            for group in groups:
                commands += group.get("commands") or [] if isinstance(group, Mapping) else []
    return any("run.args" in str(command) for command in commands)
