"""The fallbacks that a workflow engine takes from its users, as ``Fallbacks``; the same for all engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dstack_core.errors import ConfigurationError
from dstack_core.integration.fallbacks import Fallbacks

if TYPE_CHECKING:
    from dstack_core.models.configurations import Configuration

# The options that choose or keep machines. What else a run has, such as its environment and its tags, belongs
# to the task, and ``max_cost`` is for all steps together.
FALLBACK_OPTIONS = (
    "backends",
    "max_duration",
    "max_price",
    "resources",
    "retry_policy",
    "spot_policy",
    "survive",
)


def host_fallbacks(
    fallbacks: Sequence[Mapping[str, Any]] | None,
    on_exit: Mapping[int, int | Literal["next"]] | Mapping[str, int | Literal["next"]] | None,
) -> Fallbacks | None:
    """Return the fallbacks of a task, None if it has none; for the parameters of an engine's task.

    Args:
        fallbacks: The parameter ``fallbacks``: what step 2, step 3 and so on are submitted with.
        on_exit: The parameter ``fallback_on_exit``: exit statuses that lead to another step. Digits, which
            JSON and templates make of numbers, count as such.

    Raises:
        ConfigurationError: A value is wrong; it names the parameter and, for an option that a fallback
            cannot have, those that it can.

    Example:
        ``host_fallbacks([{"spot_policy": "on-demand"}], {"137": "next"})``
    """
    if on_exit is not None and not isinstance(on_exit, Mapping):
        raise ConfigurationError(
            f'fallback_on_exit: expected a dict such as {{137: "next"}}, got {on_exit!r}.'
        )
    # What is empty counts as left out.
    if fallbacks is None or (isinstance(fallbacks, list | tuple) and not fallbacks):
        if on_exit:
            raise ConfigurationError(
                "fallback_on_exit: expected fallbacks with it, got none. Set fallbacks to what the next step "
                'is submitted with, such as [{"resources": {"memory": "64GB.."}}].'
            )
        return None
    if not isinstance(fallbacks, list | tuple):
        raise ConfigurationError(
            'fallbacks: expected a list of dicts of submit options such as {"spot_policy": "on-demand"}, got '
            f"{fallbacks!r}."
        )
    for number, each in enumerate(fallbacks):
        unknown = [name for name in each if name not in FALLBACK_OPTIONS] if isinstance(each, Mapping) else []
        if unknown:
            raise ConfigurationError(
                f"fallbacks[{number}]: expected options that choose or keep machines "
                f"({', '.join(FALLBACK_OPTIONS)}), got {unknown[0]!r}."
            )
    given = {_status(status): _target(target) for status, target in (on_exit or {}).items()}
    try:
        return Fallbacks([dict(each) if isinstance(each, Mapping) else each for each in fallbacks], given)
    except ConfigurationError as error:
        raise ConfigurationError(error.message.replace("on_exit:", "fallback_on_exit:", 1)) from None


def refuse_service(configuration: Configuration) -> None:
    """Refuse fallbacks for a service, which has no end that leads to another step.

    Raises:
        ConfigurationError: The configuration is that of a service.
    """
    if configuration.type == "service":
        raise ConfigurationError(
            "fallbacks: expected the configuration of a task with it, got that of a service. Set the retry "
            "policy of the service instead."
        )


def _status(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _target(value: Any) -> Any:
    return value if value == "next" else _status(value)
