"""The parts that only services have: models, scaling, limits, probes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dstack_core.local.quantities import IntRange, Seconds, Strict

# Limits of the 0.22.5 server; the windows are in seconds.
_INT64 = 2**63 - 1
_WINDOWS = (30, 60, 300)


class TgiModel(Strict):
    """A model behind Hugging Face's text generation server."""

    type: Literal["chat"] = "chat"
    name: str
    format: Literal["tgi"]
    chat_template: str | None = None
    eos_token: str | None = None


class OpenAiModel(Strict):
    """A model behind an API like OpenAI's."""

    type: Literal["chat"] = "chat"
    name: str
    format: Literal["openai"]
    prefix: str = "/v1"


def read_model(value: Any) -> Any:
    """Return the model that a bare name stands for."""
    return {"name": value, "format": "openai"} if isinstance(value, str) else value


Model = Annotated[TgiModel | OpenAiModel, Field(discriminator="format")]


def _check_window(value: int) -> int:
    if value not in _WINDOWS:
        raise ValueError(f"Window must be one of: {_WINDOWS}")
    return value


class Scaling(Strict):
    """The rule by which a service gets more or fewer replicas."""

    metric: Literal["rps"]
    target: Annotated[float, Field(gt=0)]
    window: Annotated[Seconds, AfterValidator(_check_window)] | None = None
    scale_up_delay: Seconds = 300
    scale_down_delay: Seconds = 600


class ByAddress(Strict):
    """A rate limit for each address."""

    type: Literal["ip_address"] = "ip_address"


class ByHeader(Strict):
    """A rate limit for each value of a header."""

    type: Literal["header"] = "header"
    header: Annotated[str, Field(pattern=r"^[a-zA-Z0-9-_]+$", max_length=500)]


class RateLimit(Strict):
    """The limit of requests per second to a path."""

    prefix: Annotated[str, Field(max_length=4094, pattern=r"^/[^\s\\{}]*$")] = "/"
    key: Annotated[ByAddress | ByHeader, Field(discriminator="type")] = ByAddress()
    rps: Annotated[float, Field(ge=1 / 60, le=_INT64 // 60)]
    burst: Annotated[int, Field(ge=0, le=_INT64)] = 0


def check_limits(value: list[RateLimit]) -> list[RateLimit]:
    """Raise ValueError if two limits are for the same path."""
    if len({limit.prefix for limit in value}) < len(value):
        raise ValueError("Each rate limit should have a unique path prefix")
    return value


class Header(Strict):
    """A header of a probe."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    value: Annotated[str, Field(min_length=1, max_length=2048)]


def _check_url(value: str) -> str:
    if not value.startswith("/") or len(value) > 2048 or not value.isprintable():
        raise ValueError("Must start with `/`, be printable and have at most 2048 characters")
    return value


class Probe(Strict):
    """A request that checks the health of a service; this server stores it and never sends it."""

    type: Literal["http"]
    url: Annotated[str, AfterValidator(_check_url)] | None = None
    method: Literal["get", "post", "put", "delete", "patch", "head"] | None = None
    headers: Annotated[list[Header], Field(max_length=16)] = Field(default_factory=list)
    body: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    timeout: Annotated[Seconds, Field(ge=1)] | None = None
    interval: Annotated[Seconds, Field(ge=1)] | None = None
    ready_after: Annotated[int, Field(ge=1)] | None = None
    until_ready: bool | None = None

    @model_validator(mode="after")
    def _body_needs_a_method(self) -> Self:
        if self.body is not None and self.method in ("get", "head"):
            raise ValueError(f"Cannot set request body for the `{self.method}` method")
        return self


def check_probes(value: list[Probe] | None) -> list[Probe] | None:
    """Raise ValueError if two probes are the same."""
    for number, probe in enumerate(value or []):
        if probe in (value or [])[:number]:
            raise ValueError("Probes must be unique")
    return value


def check_replicas(value: IntRange | None) -> IntRange | None:
    """Raise ValueError unless the number of replicas has a maximum and is not negative."""
    if value is None:
        return None
    if value.max is None:
        raise ValueError("The maximum number of replicas is required")
    if value.min is None:
        value.min = 0
    if value.min < 0:
        raise ValueError("The minimum number of replicas must be greater than or equal to 0")
    return value


def check_scaling(replicas: IntRange | None, scaling: Scaling | None) -> None:
    """Raise ValueError unless `scaling` is set if and only if `replicas` is a range."""
    if replicas is not None and (replicas.min != replicas.max) != (scaling is not None):
        raise ValueError("`scaling` and a range of `replicas` need each other")


class Router(Strict):
    """The router of a replica group."""

    type: Annotated[
        Literal["sglang", "dynamo"],
        # The server accepts smg and writes it as sglang.
        BeforeValidator(lambda value: "sglang" if value == "smg" else value),
    ] = "sglang"
