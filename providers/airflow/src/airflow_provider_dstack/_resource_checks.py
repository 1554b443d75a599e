"""What a fleet or volume operator checks when the DAG is parsed: all that no template fills in later.

The checks are those of ``dstack_core``, whose import costs a DAG file some 50 ms; only a file with a
configuration that can be checked pays for it. A path object is read where the task runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from airflow_provider_dstack._parameters import is_model, read_fleet, read_volume

_TEMPLATE = ("{{", "{%", "{#")
_FILES = (".yml", ".yaml")


def check_fleet(configuration: Any, name: Any = None, machines: int | None = None) -> None:
    """Raise ``ValueError`` for what is wrong with a fleet, as far as it is known."""

    def check() -> None:
        from dstack_core.integration import check_machines

        fleet = read_fleet(configuration)
        if machines is not None:
            check_machines("machines", machines, fleet)

    _check(check, configuration, name, "fleet")


def check_volume(configuration: Any, name: Any = None) -> None:
    """Raise ``ValueError`` for what is wrong with a volume, as far as it is known."""
    _check(lambda: read_volume(configuration), configuration, name, "volume")


def _check(read: Callable[[], object], configuration: Any, name: Any, kind: str) -> None:
    is_known, is_named = _is_known(configuration), name is not None and _is_known(name)
    if not (is_known or is_named):
        return
    from dstack_core import ConfigurationError
    from dstack_core.integration import check_resource_name

    try:
        if is_named:
            check_resource_name(name, kind)
        if is_known:
            read()
    except ConfigurationError as error:
        raise ValueError(error.message) from None


def _is_known(value: Any) -> bool:
    """Return whether nothing in a value is filled in later, or read from a file by Airflow or the task."""
    if isinstance(value, str):
        is_file = "\n" not in value and value.endswith(_FILES)
        return not is_file and not any(sign in value for sign in _TEMPLATE)
    if is_model(value):
        return all(_is_known(getattr(value, field)) for field in value.model_fields_set)
    if isinstance(value, Mapping):
        return all(_is_known(key) and _is_known(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_known, value))
    # Neither the output of another task nor a path.
    return value is None or isinstance(value, bool | int | float)
