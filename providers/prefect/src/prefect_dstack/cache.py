"""The cache policy of tasks that submit a configuration: their key is made of what the run is made of.

The problem: Prefect's ``INPUTS`` hashes the arguments of a task as they were passed. The path of a
``.dstack.yml`` is then its name, and a changed file gets the result of the old one. Arguments that control
how the run is watched, such as ``poll_interval``, change the key, and a renewed secret does too.

The idea: the arguments are resolved as for a submission, and the key is a hash of what came out, together
with a digest of the local code and files. No request is made, and no secret is part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefect.cache_policies import CachePolicy, Inputs
from prefect.context import TaskRunContext

from prefect_dstack._options import OPTION_NAMES
from prefect_dstack._secrets import GitLogin
from prefect_dstack._submission import MASK, Submission, resolve

__all__ = ["RUN_INPUTS", "RunInputs"]

# How a run is watched and shown, who pays for it, and what it is cloned with: not what comes out of it.
WATCHED = frozenset(
    {
        *("poll_interval", "retry_budget", "stream_logs", "log_budget_bytes", "log_timestamps", "artifacts"),
        *("callbacks", "on_crash", "git_credentials", "mask_env", "tags", "debug_on_failure", "max_cost"),
        "survive",
    }
)
_RESOLVED = frozenset({"configuration", "credentials", "options", "repo_dir", "local_repo"})


@dataclass
class RunInputs(CachePolicy):
    """A cache policy for ``run_task`` and its siblings, by the content of what they submit.

    The key changes with the configuration, also with that of a file whose path is given, with the options,
    the values of its environment, the profile, and the content of ``repo_dir``, ``files`` and local
    ``repos``. It does not change with the paths and times of files, with secrets, or with arguments that only
    concern how the run is watched. ``RUN_INPUTS`` is the policy without exclusions; ``+`` and ``-`` work as
    for Prefect's own policies.

    Args:
        exclude: Names of parameters and options that do not change the key. Default: none.

    Example:
        ``run_task.with_options(cache_policy=RUN_INPUTS)("train.dstack.yml")``

    Source: Prefect's documentation, "Caching".
    """

    exclude: tuple[str, ...] = ()

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Return the key, None for input that the task itself refuses.

        Args:
            task_ctx: The context of the task run.
            inputs: The arguments of the task.
            flow_parameters: Those of the flow; they are not used.
            **kwargs: What Prefect may add; it is not used.

        Returns:
            64 hexadecimal digits, or None.

        Raises:
            ConfigurationError: The task has no parameter ``configuration``.
        """
        from dstack_core import ConfigurationError
        from dstack_core.integration import code_digest, short_hash

        if "configuration" not in inputs:
            raise ConfigurationError(
                "RUN_INPUTS: expected a task with a parameter configuration, such as run_task, got the task "
                f"{task_ctx.task.name!r}. Use Prefect's INPUTS for it."
            )
        given = {**inputs, **(inputs.get("options") or {})}
        given = {name: value for name, value in given.items() if name not in {*WATCHED, *self.exclude}}
        options = {name: value for name, value in given.items() if name in OPTION_NAMES}
        try:
            found = resolve(given["configuration"], options, GitLogin(), ends=False, names_exist=False)
            code = code_digest(found.configuration, found.code.repo_dir)
        except ConfigurationError:
            return None
        rest = {name: value for name, value in given.items() if name not in {*_RESOLVED, *OPTION_NAMES}}
        parts = {
            **_described(found),
            "code": code,
            # The async twin returns the same.
            "task": task_ctx.task.fn.__name__.removeprefix("a"),
            "target": None if "credentials" in self.exclude else _target(given.get("credentials")),
            "rest": Inputs().compute_key(task_ctx, rest, flow_parameters),
        }
        return short_hash(json.dumps(parts, sort_keys=True, default=str), 64)

    def __sub__(self, other: str) -> RunInputs:
        """Return the policy without a parameter or option."""
        if not isinstance(other, str):
            raise TypeError(f"RUN_INPUTS: expected the name of a parameter, got {other!r}.")
        return replace(self, exclude=(*self.exclude, other))


RUN_INPUTS = RunInputs()


def _described(found: Submission) -> dict[str, Any]:
    """Return what the submission is, without paths of this machine and without secrets."""
    described = {name: value for name, value in found.described.items() if name not in _RESOLVED}
    configuration = dict(found.described["configuration"])
    for name in ("files", "repos"):
        if configuration.get(name):
            configuration[name] = [{**each, "local_path": None} for each in configuration[name]]
    profile = found.arguments["profile"]
    return {
        **described,
        "configuration": configuration,
        "profile": profile.model_dump(mode="json"),
        "reports": found.arguments["reports"],
        "open_env": _open_env(found),
    }


def _open_env(found: Submission) -> dict[str, str | None]:
    """Return what this process gives to the names that the configuration leaves open; secrets are masked."""
    env = found.configuration.env
    names = [name for name, value in env.items() if value is None] if isinstance(env, Mapping) else []
    passed = found.arguments["env"] or {}
    values = {name: os.environ.get(name) for name in names if name not in passed}
    return {name: MASK if value in found.secrets else value for name, value in values.items()}


def _target(credentials: Any) -> Any:
    """Return the server and the project of a block, without its token."""
    if hasattr(credentials, "project_name"):
        return [str(credentials.server_url), credentials.project_name]
    return credentials
