"""What a ``DstackRun`` block submits: for the block, and for its handle, which submits further steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import SecretStr

from prefect_dstack._secrets import name_or_secret, names_of_secrets
from prefect_dstack._submission import resolve

if TYPE_CHECKING:
    from prefect_dstack._secrets import GitLogin
    from prefect_dstack._submission import Submission
    from prefect_dstack.job_block import DstackRun


def git_of_block(block: DstackRun) -> SecretStr | str | None:
    """Return the block's own ``git_credentials``, or None."""
    return None if block.git_credentials is None else name_or_secret(block.git_credentials)


def submission_of_block(block: DstackRun, login: GitLogin) -> Submission:
    """Return what to submit for the block. Raises ``ConfigurationError``."""
    from prefect_dstack._options import OPTION_NAMES

    options = {name: getattr(block, name) for name in OPTION_NAMES}
    # Each value is hidden on its own, so that the name of the run does not depend on it.
    env = None if block.env is None else block.env.get_secret_value()
    secret = None if env is None else {name: SecretStr(str(value)) for name, value in env.items()}
    names = {*block.secret_names, *names_of_secrets(block.configuration.get("env"))}
    return resolve(block.configuration, {**options, "env": secret}, login, secret_names=names)
