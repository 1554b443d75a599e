"""Take secrets from where Prefect keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.blocks.core import Block
from pydantic import Secret as PydanticSecret
from pydantic import SecretStr

_SECRET_TYPES = (SecretStr, PydanticSecret)
# What Prefect itself gives to a run on a machine is no secret, apart from how to log in.
_PREFECTS = "PREFECT_"
_PREFECTS_SECRETS = ("_KEY", "_AUTH_STRING")


def secrets_in(env: Mapping[str, str]) -> list[str]:
    """Return the values of a run's environment that may be secrets."""
    from dstack_core.integration import collect_secrets

    return collect_secrets(
        env={
            name: value
            for name, value in env.items()
            if not name.startswith(_PREFECTS) or name.endswith(_PREFECTS_SECRETS)
        }
    )


def is_secret(value: object) -> bool:
    """Whether a value is a ``Secret`` block or one of pydantic's secret types."""
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return isinstance(held, _SECRET_TYPES)


def plain(value: Any) -> Any:
    """Return what a secret holds, and any other value as it is.

    A ``Secret`` block's own ``get()`` would read the text ``"1e5"`` as a number.
    """
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return held.get_secret_value() if isinstance(held, _SECRET_TYPES) else value


def with_plain_secrets(value: Any) -> Any:
    """Return a copy of nested mappings and lists with what each secret holds in its place."""
    if isinstance(value, Mapping):
        return {key: with_plain_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_plain_secrets(item) for item in value]
    return plain(value)
