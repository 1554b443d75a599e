"""Check an operator's parameters, and read what a DAG author wrote into what ``dstack_core`` submits.

What is checked when the DAG is parsed raises ``ValueError``; what may be a template is checked by the task.
No function here imports ``dstack_core`` before it is called: a DAG file would pay for that.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from dstack_core import Configuration, FleetConfiguration, ReportLimits, VolumeConfiguration
    from dstack_core.integration import MaskEnv

Choice = TypeVar("Choice", bound=str)
# Whether a run can report by default.
DEFAULT_REPORTS = True
Returns: TypeAlias = Literal["outcome", "result"]
RETURNS = ("outcome", "result")
# What is right at a glance, of ``tags`` and ``debug_on_failure``.
_TAG = re.compile(r"[A-Za-z0-9_-]{1,60}=[A-Za-z0-9_-]{0,256}")
_HOLD = re.compile(r"[1-9]\d{0,4}s?|[1-9]\d{0,3}m|[1-9]\d?h|[1-7]d|1w")
_HOLD_LITERALS = (str, int, float, bytes, list, tuple, set, frozenset, dict, timedelta)
_LITERALS = (str, int, float, list, dict, type(None))
_CORES_NAMES = re.compile(r"\b(?:git_identity_file|git_private_key|oauth_token)\b")
# What the operator calls options of ``dstack_core``: Airflow has parameters of these names.
RENAMED = {"resources": "run_resources", "retry_policy": "run_retry_policy"}
# The word "resources" also stands for any machine's, so only the first of a message is the option.
_RENAMED = re.compile(r"^resources\b|\bretry_policy\b")


def read_configuration(value: Any) -> Configuration:
    """Return the configuration that the field holds: a model, a dict, a path object, or YAML text.

    Raises ``ConfigurationError``.
    """
    from dstack_core import load_configuration, parse_configuration

    return parse_configuration(value) if isinstance(value, str) else load_configuration(value)


def read_fleet(value: Any) -> FleetConfiguration:
    """Return the fleet's configuration that the field holds: a model, a dict, a path object, or YAML text.

    Raises ``ConfigurationError``.
    """
    from dstack_core import load_fleet

    return load_fleet(_mapping_in(value))


def read_volume(value: Any) -> VolumeConfiguration:
    """Return a volume's configuration, likewise. Raises ``ConfigurationError``."""
    from dstack_core import load_volume

    return load_volume(_mapping_in(value))


def _mapping_in(value: Any) -> Any:
    """Return what a text holds as YAML; Airflow has read the file that it named."""
    if not isinstance(value, str):
        return value
    import yaml

    from dstack_core import ConfigurationError

    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"configuration: expected YAML, got {error}.") from None
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"configuration: expected a dict, YAML text or the path of a .yml or .yaml file, got {value!r}."
        )
    return found


def with_local_paths(configuration: Configuration, folder: Path | None) -> Configuration:
    """Return the configuration with the relative paths of its ``files`` and ``repos`` below ``folder``."""
    changes: dict[str, Any] = {}
    for field in ("files", "repos") if folder is not None else ():
        changes[field] = [_below(item, folder) for item in getattr(configuration, field) or ()]
    changes = {field: items for field, items in changes.items() if items}
    return configuration.model_copy(update=changes) if changes else configuration


def _below(item: Any, folder: Any) -> Any:
    local = item.local_path
    if local is None or local.startswith("~"):
        return item
    return item.model_copy(update={"local_path": str(PurePath(folder) / local)})


def read_price(value: Any) -> Any:
    """Return ``max_price`` or ``max_cost`` (USD) as a number where a template made a text of it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_duration(value: Any) -> Any:
    """Return ``max_duration`` as seconds (int) where a template made a text of them."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def read_backends(value: Any) -> Any:
    """Return ``backends`` as a list where one name was given as it is."""
    return [value] if isinstance(value, str) else value


def is_model(value: Any) -> bool:
    """Return whether a value is a model of ``dstack_core``, without importing one."""
    return hasattr(type(value), "model_fields") and hasattr(value, "model_fields_set")


def render_model(model: Any, render: Callable[[str, Any], Any]) -> Any:
    """Return a copy of ``model`` with its fields rendered by name. Raises ``ConfigurationError``."""
    fields = {name: render(name, getattr(model, name)) for name in model.model_fields_set}
    return type(model).model_validate(fields)


def secrets_in(
    configuration: Any, env: Any = None, mask_env: MaskEnv = "secrets", secret_names: Collection[str] = ()
) -> list[str]:
    """Return the texts to hide in logs; ``env`` is the operator's, which wins.

    ``secret_names`` are variables that Airflow keeps the values of as secrets.
    """
    from dstack_core.integration import collect_secrets

    configuration = readable_or_none(configuration)
    return collect_secrets(configuration, env=env, mask_env=mask_env, secret_names=secret_names)


def readable_or_none(configuration: Any) -> Any:
    """Return a configuration, read if it is text or a file; None for one that cannot be read."""
    from dstack_core import ConfigurationError

    if not isinstance(configuration, str | os.PathLike):
        return configuration
    try:
        return read_configuration(configuration)
    except ConfigurationError:
        return None


def mask_env_of(value: Any) -> MaskEnv:
    """Return ``mask_env``, names as a list; raise ``ValueError`` for anything else."""
    if isinstance(value, str):
        return one_of("mask_env", value, ("secrets", "all", "none"))
    is_names = isinstance(value, list | tuple | set | frozenset)
    if not is_names or not all(isinstance(name, str) and name for name in value):
        raise ValueError(
            'mask_env: expected "secrets", "all", "none" or a list of names such as ["LICENSE"], got '
            f"{value!r}."
        )
    return sorted(set(value))


def check_masked(operator: Any, configuration: Any, env: Any) -> None:
    """Refuse a name in the operator's ``mask_env`` that no variable has. Raises ``ConfigurationError``.

    That of ``default_args`` may be for tasks that do not all have the variable.
    """
    from dstack_core.integration import check_masked_names

    groups = (operator.dag if operator.has_dag() else None, operator.task_group)
    defaults = (getattr(group, "default_args", None) or {} for group in groups)
    if not any("mask_env" in each for each in defaults):
        check_masked_names(operator.mask_env, configuration, env)


def in_words_of_operator(message: str) -> str:
    """Return an error of ``dstack_core`` with the names that the arguments have here."""
    message = _CORES_NAMES.sub("git_conn_id", message)
    return _RENAMED.sub(lambda found: RENAMED[found[0]], message)


def one_of(name: str, value: Choice, choices: Collection[str]) -> Choice:
    """Return ``value``; raise ``ValueError`` when it is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def at_least(name: str, value: float, least: float) -> float:
    """Return ``value`` (seconds); raise ``ValueError`` when it is not a number, or less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        unit = "second" if least == 1 else "seconds"
        raise ValueError(f"{name}: expected {least:g} {unit} or more, got {value!r}.")
    return float(value)


def yes_or_no(name: str, value: bool) -> bool:
    """Return ``value``; raise ``ValueError`` when it is not a bool: a text such as ``"False"`` is true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}.")
    return value


def check_literals(*, tags: Any, debug_on_failure: Any, max_cost: Any) -> None:
    """Raise ``ValueError`` for a wrong value of a template field that contains no template."""
    if isinstance(max_cost, _LITERALS) and not _is_template(max_cost):
        check_cost(max_cost)
    # The output of another task is filled in later.
    if isinstance(debug_on_failure, _HOLD_LITERALS) and not _is_template(debug_on_failure):
        check_hold(debug_on_failure)
    is_literal = isinstance(tags, str | bool | int | float | list | tuple | set) and not _is_template(tags)
    if isinstance(tags, Mapping):
        plain = {key: one for key, one in tags.items() if not _is_template(key) and not _is_template(one)}
        # The output of another task is filled in later.
        known = {key: one for key, one in plain.items() if isinstance(one, _LITERALS)}
        # Only for what is not plainly right: ``dstack_core`` costs a DAG file its import.
        is_literal = not all(
            isinstance(key, str) and isinstance(one, str) and _TAG.fullmatch(f"{key}={one}")
            for key, one in known.items()
        )
        tags = known
    if is_literal and tags is not False:
        from dstack_core import ConfigurationError
        from dstack_core.integration import check_tags

        try:
            check_tags("tags", tags)
        except ConfigurationError as error:
            raise ValueError(error.message) from None


def budget_cost(value: Any) -> Any:
    """Return the ``max_cost`` of a budget; raise ``ValueError`` for a wrong one that contains no template."""
    if value is None:
        raise ValueError("max_cost: expected USD above 0, got None.")
    if isinstance(value, _LITERALS) and not _is_template(value):
        check_cost(value)
    return value


def check_cost(value: Any) -> None:
    """Raise ``ValueError`` for a wrong ``max_cost``."""
    number = read_price(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if value is not None and not (is_number and 0 < number < math.inf):
        raise ValueError(f"max_cost: expected USD above 0, got {value!r}.")


def check_hold(value: Any) -> None:
    """Raise ``ValueError`` for a wrong ``debug_on_failure``."""
    # What is not plainly right costs a DAG file the import of ``dstack_core``.
    if isinstance(value, bool) or not (isinstance(value, int | str) and _HOLD.fullmatch(str(value))):
        from dstack_core import ConfigurationError
        from dstack_core.integration import hold_seconds

        try:
            hold_seconds(value)
        except ConfigurationError as error:
            raise ValueError(error.message) from None


def check_survive(value: Any) -> None:
    """Raise ``ValueError`` for a wrong ``survive`` that contains no template."""
    # What is plainly right costs a DAG file no import of ``dstack_core``; another task's output comes later.
    if value is None or _is_template(value) or (isinstance(value, str) and _HOLD.fullmatch(value)):
        return
    own = value.values() if isinstance(value, Mapping) else [value]
    if all(isinstance(each, _LITERALS) and not _is_template(each) for each in own):
        from dstack_core import ConfigurationError
        from dstack_core.integration import read_survive

        try:
            read_survive(value)
        except ConfigurationError as error:
            raise ValueError(error.message) from None


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def log_budget(value: int | None) -> int | None:
    """Return ``log_budget_bytes``; raise ``ValueError`` when it is not a number of bytes or None."""
    is_fine = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    if not is_fine:
        raise ValueError(
            f"log_budget_bytes: expected bytes of log, 0 or more, or None for all of it, got {value!r}."
        )
    return value


def most(name: str, value: int | None, least: int) -> int | None:
    """Return a limit; raise ``ValueError`` when it is not a whole number from ``least`` on, or None."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and value >= least):
        raise ValueError(f"{name}: expected a whole number from {least} on, or None, got {value!r}.")
    return value


def report_limits(max_bytes: int | None, per_second: int | None) -> ReportLimits:
    """Return the limits on what a run reports; None for one is the default of ``dstack_core``."""
    from dstack_core import ReportLimits

    given = {"max_bytes": max_bytes, "per_second": per_second}
    return ReportLimits(**{name: value for name, value in given.items() if value is not None})


def exit_codes(name: str, value: Any) -> tuple[int, ...]:
    """Return exit statuses, given as one or several, as a tuple; raise ``ValueError`` for anything else."""
    codes = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
    codes = () if value is None else codes
    if not all(isinstance(code, int) and not isinstance(code, bool) and 0 <= code <= 255 for code in codes):
        raise ValueError(f"{name}: expected an exit status from 0 to 255, or a list of such, got {value!r}.")
    return codes


def refuse_result(arguments: Mapping[str, Any], why: str) -> None:
    """Raise ``ValueError`` where ``returns`` asks an operator for what it does not return."""
    if arguments.get("returns", "outcome") != "outcome":
        raise ValueError(f'returns: expected "outcome", got {arguments["returns"]!r}. {why}')


def refuse_hosts_names(arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where dstack's resources or retry policy is given under Airflow's own name."""
    for name in ("resources", "retry_policy"):
        # Airflow makes its own resources from a dict.
        form_of_dstack = name == "resources" and isinstance(arguments.get(name), str | int | float)
        if form_of_dstack or is_model(arguments.get(name)):
            raise ValueError(f"{name}: expected Airflow's own {name}, got dstack's. Pass it as run_{name}.")
