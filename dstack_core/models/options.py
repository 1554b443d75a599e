"""What a submission may set beside its configuration: each option is declared here, once.

Three layers, because two callers cannot take all of them as they are. ``submit`` has the parameters of the
documented API, which may be passed by position, so it unpacks only ``KeywordOptions``; an engine whose
``env`` holds more than text, such as secrets, extends ``CommonOptions``. Everything else takes
``SubmitOptions``.

A new option belongs in ``KeywordOptions``: every client, Prefect's tasks, and the tests of all the places
that spell their own follow from it. ``CONTRIBUTING.md`` has the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from dstack_core.models.policies import RetryPolicy
    from dstack_core.models.profiles import Profile
    from dstack_core.models.resources import Resources
    from dstack_core.models.statuses import SpotPolicy


class KeywordOptions(TypedDict, total=False):
    """The options that ``submit`` takes by keyword only."""

    args: Sequence[str] | None
    """What ``${{ run.args }}`` in commands stands for, each argument quoted for the shell. Default: none."""
    profile: str | Profile | None
    """The name of a profile, or a ``Profile``. Default: the one marked ``default: true``, as ``load_profile``
    finds it in the ``repo_dir``, else the current directory, and the user's own.
    """


class CommonOptions(KeywordOptions, total=False):
    """The options that mean the same to every engine: all but ``env``."""

    resources: Resources | Mapping[str, Any] | str | int | None
    """``Resources``, whose numbers are minimums; or a mapping, or a GPU in its short form (``"24GB.."``,
    ``"A100:40GB:2"``, 1), which mean what they mean in YAML. Default: those of the configuration, which it
    replaces.
    """
    spot_policy: SpotPolicy | str | None
    """``SpotPolicy``, ``"spot"``, ``"on-demand"`` or ``"auto"``. Default: the configuration's, else the
    server's choice.
    """
    retry_policy: RetryPolicy | Mapping[str, Any] | bool | None
    """A ``RetryPolicy``: whether and how long to wait for capacity; or True, False or a mapping, which mean
    what they mean for ``retry`` in YAML. Default: the configuration's.
    """
    max_duration: int | str | None
    """When the run is stopped at the latest: seconds, ``"2h"`` or ``"off"``. Default: the configuration's."""
    max_price: float | None
    """The highest price, in USD per hour. Default: the configuration's, else no limit."""
    working_dir: str | None
    """Where commands start: relative to the code's directory, absolute, or ``~/x``. Default: the
    configuration's, else the code's directory, else the image's own.
    """
    backends: list[str] | None
    """The only backends to take machines from. Default: the configuration's, else all of the project."""


class SubmitOptions(CommonOptions, total=False):
    """All options of ``plan``, ``submit`` and ``apply``; None for one is the same as leaving it out."""

    env: Mapping[str, str] | None
    """Values for the names of the configuration's ``env`` that have none; replaces values and adds variables,
    too. Names without a value are then read from the environment of this process. Default: none.
    """


def check_options(given: Mapping[str, object], known: frozenset[str] | None = None) -> None:
    """Raise ``TypeError`` naming what is not an option.

    Args:
        given: The options by name.
        known: The names to accept. Default: those of ``SubmitOptions``.
    """
    names = SubmitOptions.__optional_keys__ if known is None else known
    if unknown := ", ".join(sorted(set(given) - names)):
        raise TypeError(
            f"{unknown}: expected one of the options {', '.join(sorted(names))}, got {unknown}. "
            "Check the spelling."
        )
