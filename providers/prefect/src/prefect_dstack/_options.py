"""The options of this package's tasks: those of every submission, and what a flow run's machine adds to them.

A module of its own because its base class is the core's: importing the package loads nothing of
``dstack_core``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dstack_core import CommonOptions

if TYPE_CHECKING:
    from dstack_core.integration import MaskEnv
    from prefect_dstack._secrets import GitCredentialsLike


class SubmitOptions(CommonOptions, total=False):
    """The options that all ways to submit have in common; ``run_task`` explains them."""

    env: Mapping[str, Any] | None
    """Environment variables; values are texts, ``Secret`` blocks or ``SecretStr``."""
    profiles_file: str | os.PathLike[str] | None
    """The file of profiles. Default: ``.dstack/profiles.yml`` in ``repo_dir``."""
    repo_dir: str | os.PathLike[str] | None
    """A directory whose contents the run gets."""
    local_repo: bool
    """Upload the contents of ``repo_dir`` even if it is a Git checkout. Default: False."""
    git_credentials: GitCredentialsLike
    """What a private repository is cloned with. Default: those of the credentials block."""
    mask_env: MaskEnv
    """Which values of the environment are masked. Default: ``"secrets"``."""
    fallbacks: Sequence[Mapping[str, Any]] | None
    """The options of further runs, if the one before ended for lack of a machine. Default: none."""
    fallback_on_exit: Mapping[int, int | Literal["next"]] | None
    """Exit statuses that lead to another of them, too. Default: none."""


OPTION_NAMES = SubmitOptions.__optional_keys__
# Only what follows its run to the end has these.
STEP_NAMES = frozenset({"fallbacks", "fallback_on_exit"})
