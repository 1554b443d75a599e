"""How long to wait for capacity."""

from __future__ import annotations

from pydantic import field_validator

from dstack_core.models.base import Model
from dstack_core.models.durations import check_duration


class RetryPolicy(Model):
    """Wait for capacity instead of failing when there is none.

    ``retry`` (bool) turns it on; ``limit`` is the longest wait: an int in seconds or a str such as
    ``"12h"`` or ``"3d"``; one hour when it is left out. Source: the documented API, "RetryPolicy";
    PROTOCOL 3.1, 3.2.
    """

    retry: bool = False
    limit: int | str | None = None

    @field_validator("limit")
    @classmethod
    def _check_limit(cls, value: int | str | None) -> int | str | None:
        check_duration(value)
        return value
