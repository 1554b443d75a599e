"""The base of the models that a caller fills in, which turns their errors into sentences.

The problem: pydantic raises a ``ValidationError`` that lists every member of every union in terms of its own
types, and it shows inputs, which may be secrets.

The idea: a validator around each model catches that error and raises one ``ConfigurationError`` instead
(``complaints`` writes it). Models contain models, and only the outermost one knows the whole path of a wrong
field, so inner ones pass the error on; a context variable marks that a validation is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dstack_core.errors import ConfigurationError
from dstack_core.models.complaints import Known, in_words

# A context variable and not a global: models are validated in several threads and tasks at once.
_is_within: ContextVar[bool] = ContextVar("_is_within", default=False)


class Model(BaseModel):
    """A model of a caller's input, which raises one ``ConfigurationError`` for everything that is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # What errors call the expected value.
    _form: ClassVar[str] = "a mapping"

    @model_validator(mode="wrap")
    @classmethod
    def _tell_clearly(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if _is_within.get():
            return handler(data)
        token = _is_within.set(True)
        try:
            return handler(data)
        except ValidationError as error:
            kind = cls.model_fields["type"].default if "type" in cls.model_fields else None
            late = _late_values(data, kind if isinstance(kind, str) else None)
            words = f"{cls.__name__}.{late}" if late else in_words(cls.__name__, error, _known(Model))
            raise ConfigurationError(words) from None
        finally:
            _is_within.reset(token)


def _known(kind: type[Model]) -> dict[str, Known]:
    known = {kind.__name__: Known(kind._form, tuple(kind.model_fields))}
    for below in kind.__subclasses__():
        known |= _known(below)
    return known


def _late_values(data: Any, kind: str | None) -> str | None:
    """Return the error for a value that a workflow engine has only once the task runs, None without one.

    Such a value is recognized by its method ``iter_references``, which Airflow's results of other tasks have.
    A model would check it too early; a dict is checked when the task runs.
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
    """Return the first late value in ``value``, and what a dict around it looks like."""
    if hasattr(type(value), "iter_references"):
        return value, "..."
    if isinstance(value, Mapping):
        found = ((key, _late_value(one)) for key, one in value.items())
        return next(((late[0], f'{{"{key}": {late[1]}}}') for key, late in found if late is not None), None)
    if isinstance(value, list | tuple):
        late = next(filter(None, map(_late_value, value)), None)
        return None if late is None else (late[0], f"[{late[1]}]")
    return None


def known_fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``data`` that are fields of the dataclass ``kind``; the others are left out."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
