"""Reading the body of a request, with the refusals of the real server (PROTOCOL 1.1)."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from dstack_core.local.errors import invalid

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body], *, optional: bool = False) -> Body:
    """Return the body of a request; raises ApiError 422 if it does not fit the model.

    If the body is `optional`, none counts as ``{}``.
    """
    raw = await request.body()
    data: Any = None
    if not raw and optional:
        return model.model_validate({})
    if not raw:
        raise invalid([{"loc": (), "msg": "Field required", "type": "missing"}])
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        try:
            data = json.loads(raw)
        except ValueError as error:
            position = getattr(error, "pos", 0)
            raise invalid(
                [{"loc": (position,), "msg": "JSON decode error", "type": "json_invalid"}]
            ) from error
    if data is None and optional:
        return model.model_validate({})
    if not isinstance(data, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        raise invalid([{"loc": (), "msg": text, "type": "model_attributes_type"}])
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False)) from error
