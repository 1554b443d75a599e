"""The base of the models a caller fills in, and how their errors are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from dstack_core.errors import ConfigurationError


class Model(BaseModel):
    """Check a caller's input and raise one ``ConfigurationError`` for all that is wrong with it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="wrap")
    @classmethod
    def _tell_clearly(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            kind = cls.model_fields["type"].default if "type" in cls.model_fields else None
            late = _late_values(data, kind if isinstance(kind, str) else None)
            words = _in_words(cls.__name__, error) if late is None else f"{cls.__name__}.{late}"
            raise ConfigurationError(words) from None


def _in_words(model: str, error: ValidationError) -> str:
    """Name each wrong field without the values a secret may hide in (they stay out by config)."""
    told: list[str] = []
    for item in error.errors(include_url=False, include_input=False):
        where = ".".join(
            [model, *(str(part) for part in item["loc"] if not str(part).startswith("function-"))]
        )
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "there is no such field; check its spelling"
        line = f"{where}: {text}"
        if line not in told:
            told.append(line)
    return "; ".join(told)


def _late_values(data: Any, kind: str | None) -> str | None:
    """Return the error for a value that a workflow engine knows only when the task runs, None without one.

    Such a value is recognized by its method ``iter_references``, as Airflow's results of other tasks have it.
    """
    for key, value in data.items() if isinstance(data, Mapping) else ():
        found = _late_value(value)
        if found is not None:
            late, form = found
            shown = f'{{"type": "{kind}", "{key}": {form}}}' if kind else f'{{"{key}": {form}}}'
            return (
                f"{key}: expected a value, got a {type(late).__name__}, which has none before the task runs. "
                f"Write a dict instead: {shown}"
            )
    return None


def _late_value(value: Any) -> tuple[Any, str] | None:
    """Return the value in ``value`` that comes later, and how a dict is written around it."""
    if hasattr(type(value), "iter_references"):
        return value, "..."
    if isinstance(value, Mapping):
        found = ((key, _late_value(one)) for key, one in value.items())
        return next(((late[0], f'{{"{key}": {late[1]}}}') for key, late in found if late is not None), None)
    if isinstance(value, list | tuple):
        late = next(filter(None, map(_late_value, value)), None)
        return None if late is None else (late[0], f"[{late[1]}]")
    return None
