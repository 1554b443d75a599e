"""The fallbacks of a task: checked when the DAG is parsed, read once templates are rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._parameters import check_survive, read_backends, read_duration, read_price

if TYPE_CHECKING:
    from dstack_core.integration import Fallbacks

# What a text in an option of a fallback becomes, as in the option of the operator.
_READERS: dict[str, Callable[[Any], Any]] = {
    "backends": read_backends,
    "max_duration": read_duration,
    "max_price": read_price,
    "survive": lambda value: read_duration(value) if isinstance(value, str) else value,
}
_LITERALS = (str, int, float, bool, bytes, list, tuple, set, frozenset, dict)


def check_fallbacks(fallbacks: Any, on_exit: Any) -> None:
    """Raise ``ValueError`` for wrong ``fallbacks`` or ``fallback_on_exit`` that contain no template.

    The values of the options are checked by the task, as those of the operator are.
    """
    # A DAG file without fallbacks imports nothing of ``dstack_core`` for them; another task's output comes
    # later.
    if (fallbacks is None and on_exit is None) or _comes_later(fallbacks) or _comes_later(on_exit):
        return
    from dstack_core import ConfigurationError
    from dstack_core.integration import host_fallbacks

    has_templates = isinstance(on_exit, Mapping) and any(map(_comes_later, on_exit.values()))
    try:
        host_fallbacks(fallbacks, None if fallbacks and has_templates else on_exit)
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    for number, each in enumerate(fallbacks or ()):
        try:
            check_survive(each.get("survive"))
        except ValueError as error:
            raise ValueError(f"fallbacks[{number}]: {error}") from None


def read_fallbacks(fallbacks: Any, on_exit: Any) -> Fallbacks | None:
    """Return the fallbacks that the fields hold, None without any. Raises ``ConfigurationError``."""
    from dataclasses import replace

    from dstack_core.integration import host_fallbacks

    found = host_fallbacks(_plain(fallbacks), _plain(on_exit))
    if found is None:
        return None
    return replace(
        found,
        options=[
            {name: _READERS[name](value) if name in _READERS else value for name, value in each.items()}
            for each in found.options
        ],
    )


def _plain(value: Any) -> Any:
    """Return what a text holds as YAML or JSON: a template gives a text."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _comes_later(value: Any) -> bool:
    is_template = isinstance(value, str) and ("{{" in value or "{%" in value)
    return is_template or (value is not None and not isinstance(value, _LITERALS))
