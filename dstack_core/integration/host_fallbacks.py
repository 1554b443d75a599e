"""The fallbacks that a task of a host is given: checked where the task is made, before any request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dstack_core._wire.spec import run_spec
from dstack_core._wire.survival import with_survival
from dstack_core.errors import ConfigurationError
from dstack_core.integration.fallbacks import Fallbacks
from dstack_core.models.configurations import Task
from dstack_core.models.profiles import Profile
from dstack_core.models.survive import read_survive

# Those that choose a machine or keep it. Others would make another job of it, or count for all steps.
_ALLOWED = ("resources", "spot_policy", "backends", "max_price", "max_duration", "retry_policy", "survive")


def host_fallbacks(
    fallbacks: Sequence[Mapping[str, Any]] | None,
    on_exit: Mapping[int, int | Literal["next"]] | None = None,
) -> Fallbacks | None:
    """Return the fallbacks of a task, checked as far as its configuration is not needed.

    Args:
        fallbacks: The options of step 2, step 3 and so on: ``resources``, ``spot_policy``, ``backends``,
            ``max_price``, ``max_duration``, ``retry_policy`` and ``survive``. None, or an empty list: none.
        on_exit: The option ``fallback_on_exit``: exit statuses that lead to another step. JSON has texts as
            keys, so ``{"137": "next"}`` is the same as ``{137: "next"}``.

    Returns:
        The fallbacks, or None without any.

    Raises:
        ConfigurationError: A key is not allowed, or a value is wrong.
    """
    if not fallbacks:
        if on_exit:
            raise ConfigurationError(
                f"fallback_on_exit: expected fallbacks with it, got {dict(on_exit)!r} alone. "
                'Set fallbacks, such as [{"spot_policy": "on-demand"}].'
            )
        if fallbacks is None or isinstance(fallbacks, list | tuple):
            return None
    if isinstance(fallbacks, str | Mapping) or not isinstance(fallbacks, Sequence):
        raise ConfigurationError(
            'fallbacks: expected a list of dicts such as [{"spot_policy": "on-demand"}], got '
            f"{fallbacks!r}."
        )
    try:
        made = Fallbacks([*fallbacks], _whole_keys(on_exit))
    except ConfigurationError as error:
        raise ConfigurationError(error.message.replace("on_exit:", "fallback_on_exit:", 1)) from None
    for number, options in enumerate(made.options, 1):
        _check(number, options)
    return made


def _check(number: int, options: Mapping[str, Any]) -> None:
    for key in options:
        if key not in _ALLOWED:
            raise ConfigurationError(
                f"fallbacks: expected only {', '.join(_ALLOWED)} in a fallback, got {key!r} in number "
                f"{number}. What is the same for all steps is an option beside fallbacks."
            )
    try:
        survive = read_survive(options.get("survive"))
        if survive is not None:
            # Only the configuration shows whether a volume is mounted there.
            survive = survive.model_copy(update={"checkpoint": None})
        has_policy = options.get("retry_policy") is not None
        task = with_survival(Task(commands=["true"]), survive, has_policy=has_policy)
        given: Any = {**options, "profile": Profile()}
        run_spec(task, given)
    except ConfigurationError as error:
        raise ConfigurationError(f"fallbacks: in number {number}: {error.message}") from None


def _whole_keys(on_exit: Any) -> dict[Any, Any]:
    """Return the exit statuses as numbers, which JSON and templates have as texts."""
    if on_exit is not None and not isinstance(on_exit, Mapping):
        raise ConfigurationError(f'on_exit: expected a dict such as {{137: "next"}}, got {on_exit!r}.')
    return {
        int(status) if isinstance(status, str) and status.isdecimal() else status: (
            int(target) if isinstance(target, str) and target.isdecimal() else target
        )
        for status, target in (on_exit or {}).items()
    }
