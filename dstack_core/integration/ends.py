"""Refuse a configuration that never ends by itself where something waits for its end."""

from __future__ import annotations

from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration
from dstack_core.models.profiles import Profile


def check_ends(
    configuration: Configuration, max_duration: int | str | bool | None = None, profile: Profile | None = None
) -> None:
    """Raise ``ConfigurationError`` if the run of a configuration would not end by itself.

    Args:
        configuration: What ``load_configuration`` returned.
        max_duration: The limit that is passed to ``submit``; None: that of the configuration, else of the
            profile.
        profile: The profile that is passed to ``submit``.

    Raises:
        ConfigurationError: The configuration or the profile has a ``schedule``, so that the server starts it
            again and again, or it is a dev environment without ``max_duration``.
    """
    settings = [configuration] if profile is None else [configuration, profile]
    if any(each.schedule for each in settings):
        raise ConfigurationError(
            "schedule: expected a configuration that ends, got one that the server starts again and again. "
            "Drop schedule, and set the schedule where this is called from."
        )
    limits = [max_duration, *(each.max_duration for each in settings)]
    limit = next((each for each in limits if each is not None and each is not True), None)
    if configuration.type == "dev-environment" and (limit is None or limit is False or limit == "off"):
        raise ConfigurationError(
            "configuration: expected a configuration that ends, got a dev-environment without max_duration. "
            'Use `type: task`, or set max_duration, such as "2h", at which the run ends as failed.'
        )
