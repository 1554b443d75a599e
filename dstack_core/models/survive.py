"""What a run survives: the option ``survive``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationInfo, field_validator

from dstack_core.errors import ConfigurationError
from dstack_core.models.base import Model
from dstack_core.models.options import check_duration, duration_seconds

SURVIVED_EVENTS = ("interruption", "no-capacity")
"""The events that a run can survive: its spot machine is taken away; there is no machine for it."""


class Survive(Model):
    """What a run survives: dstack starts its next attempt instead of ending it.

    Attributes:
        duration: For how long in all, from the submission on: an int in seconds, or a str such as ``"12h"``
            or ``"3d"``. Once it has passed, no further attempt begins; one that runs is left alone. Default:
            24 hours.
        times: How often its machine may be lost: an int. Default: no limit. A search for a machine does not
            count.
        events: What it survives: ``"interruption"`` (the cloud took its spot machine away) and
            ``"no-capacity"`` (no machine was available, at the start or later). Default: both.
        checkpoint: A path in one of the configuration's ``volumes``, below which the run has a directory for
            its checkpoints, the same in each attempt. Its path is in ``$DSTACK_CHECKPOINT``; the program has
            to create it. It is named after the run, and for a task of an engine after the task, whose later
            tries find it, too. Default: none.

    Raises:
        ConfigurationError: A value is wrong.

    Example:
        ``client.runs.submit(task, spot_policy="spot", survive=Survive(duration="8h", times=5))``

    Source: ``retry`` of dstack's configurations; PROTOCOL 1.6, 3.2.
    """

    duration: int | str = "24h"
    times: int | None = None
    events: Sequence[str] = SURVIVED_EVENTS
    checkpoint: str | None = None

    @field_validator("duration")
    @classmethod
    def _check_duration(cls, value: int | str) -> int | str:
        check_duration(value)
        if duration_seconds(value) <= 0:
            raise ValueError(f'expected seconds above 0, or a string such as "2h" or "3d", got {value!r}')
        return value

    @field_validator("times", mode="before")
    @classmethod
    def _check_times(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"expected a whole number of 1 or more, or None, got {value!r}")
        return value

    @field_validator("events", mode="before")
    @classmethod
    def _check_events(cls, value: Any) -> Any:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not is_list or not value or any(event not in SURVIVED_EVENTS for event in value):
            known = ", ".join(f'"{event}"' for event in SURVIVED_EVENTS)
            raise ValueError(f"expected a list of {known}, got {value!r}")
        return tuple(value)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _check_checkpoint(cls, value: Any) -> Any:
        if value is None:
            return None
        parts = [part for part in value.split("/") if part] if isinstance(value, str) else []
        if not parts or not value.startswith("/") or ".." in parts:
            raise ValueError(
                f"expected an absolute path without .., such as /data/checkpoints, got {value!r}"
            )
        return "/" + "/".join(part for part in parts if part != ".")

    @property
    def seconds(self) -> int:
        """``duration`` in seconds."""
        return int(duration_seconds(self.duration))


def read_survive(option: Any) -> Survive | None:
    """Return the option ``survive``: a ``Survive``, a mapping of its fields, or its duration alone.

    True means the defaults, None and False mean nothing. Raises ``ConfigurationError``.
    """
    if option is None or option is False or isinstance(option, Survive):
        return option or None
    if option is True:
        return Survive()
    if isinstance(option, int | str):
        option = {"duration": option}
    if not isinstance(option, Mapping):
        raise ConfigurationError(
            'survive: expected a Survive, a duration such as "4h", or a dict such as '
            f'{{"duration": "4h", "times": 5}}, got {option!r}.'
        )
    try:
        return Survive.model_validate(option)
    except ConfigurationError as error:
        raise ConfigurationError(error.message.replace("Survive", "survive", 1)) from None
