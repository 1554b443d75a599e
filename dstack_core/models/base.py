"""The base of the models a caller fills in, and how their errors are told."""

from __future__ import annotations

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
            raise ConfigurationError(_in_words(cls.__name__, error)) from None


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
