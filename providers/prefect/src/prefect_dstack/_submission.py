"""From a configuration and options to the arguments of ``client.runs.submit``; no request is made here.

The rules: everything is checked before anything is submitted. A run always has a longest duration, so that
none is paid for without an end; only a deployed service may have none. Secrets are kept apart from what
describes a submission: that is hashed for the run's name and must neither hold them nor change when one is
renewed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefect_dstack._current_fleet import with_current_fleet
from prefect_dstack._current_secrets import current_secrets
from prefect_dstack._names import own_parameters
from prefect_dstack._secrets import GitLogin, Masking, is_secret, names_of_secrets, plain, with_plain_secrets

if TYPE_CHECKING:
    from dstack_core import Configuration, ConfigurationLike, Profile
    from dstack_core.integration import Fallbacks

# Ends what would cost money without a limit when Prefect, the reaper and every hook fail. A shorter one would
# stop trainings that set none.
DEFAULT_MAX_DURATION = "24h"
# Runs report unless the caller decides otherwise: results and numbers are what a flow is executed for.
DEFAULT_REPORTS = True
# How pydantic shows a secret, and so what Prefect stores of one that is a flow's parameter.
MASK = "**********"
# These are not arguments of ``client.runs.submit``, or take another form there.
_OWN = frozenset(
    {
        *("env", "profile", "profiles_file", "repo_dir", "local_repo", "git_credentials", "mask_env"),
        *("fallbacks", "fallback_on_exit"),
    }
)
_UNUSED_LOGIN = (
    "git_credentials: expected repo_dir, or repos in the configuration, with it, got neither. "
    "The credentials are not used."
)


@dataclass(frozen=True, slots=True)
class Code:
    """The directory that a run gets, how, and with which login; nothing by default."""

    repo_dir: Path | None = None
    local_repo: bool = False
    login: GitLogin = field(default_factory=GitLogin)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of ``from_config``; none where a client needs no code and no login."""
        given = {
            "repo_dir": self.repo_dir,
            "git_private_key": self.login.private_key,
            "oauth_token": self.login.token,
        }
        arguments: dict[str, Any] = {name: value for name, value in given.items() if value}
        return {**arguments, "local_repo": True} if arguments and self.local_repo else arguments

    @property
    def described(self) -> dict[str, Any]:
        """What submissions differ in: no secret, and the same in every checkout of the flow."""
        if self.repo_dir is None:
            return {}
        shown = os.path.relpath(self.repo_dir)
        # Executed on another machine, a flow has another absolute path, and must find its run again.
        inside = not shown.startswith(os.pardir)
        return {"repo_dir": shown if inside else self.repo_dir.name, "local_repo": self.local_repo}


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked submission.

    ``arguments`` are those of ``client.runs.submit``, ``code`` is what its client is made with. ``described``
    (JSON-plain, without a secret) is what two submissions differ in. ``secrets`` must not show in a log,
    ``warnings`` are for it. ``masking`` is the rule by which its environment is masked. ``fallbacks`` are
    what its later steps are submitted with, None without.
    """

    configuration: Configuration
    arguments: dict[str, Any] = field(repr=False)
    described: dict[str, Any] = field(repr=False)
    code: Code
    secrets: list[str] = field(repr=False)
    warnings: list[str]
    masking: Masking = field(default_factory=Masking, repr=False)
    fallbacks: Fallbacks | None = None


def resolve(
    configuration: ConfigurationLike,
    options: Mapping[str, Any],
    login: GitLogin,
    *,
    folder: Path | None = None,
    max_duration: str | None = DEFAULT_MAX_DURATION,
    ends: bool = True,
    follows: bool = True,
    secret_names: Collection[str] | None = None,
    names_exist: bool = True,
) -> Submission:
    """Check a configuration and options and return what to submit.

    Args:
        configuration: As for ``run_task``.
        options: The ``SubmitOptions`` that were given; those that are None count as not given.
        login: What a private repository is cloned with.
        folder: Where relative paths begin; by default the current directory.
        max_duration: That of a run which nothing else limits; None for no limit.
        ends: Refuse a configuration that never ends.
        follows: Whether the run is followed to its end, which ``fallbacks`` need.
        secret_names: The variables whose values come from secrets of Prefect's. None: those whose values are
            ``Secret`` blocks or ``SecretStr``.
        names_exist: Refuse a name in ``mask_env`` that no variable has.

    Returns:
        The submission; no request has been made.

    Raises:
        ConfigurationError: A value is wrong.
    """
    from dstack_core import check_options, load_configuration
    from dstack_core.integration import (
        check_ends,
        check_mask_env,
        check_masked_names,
        check_max_cost,
        collect_secrets,
        host_fallbacks,
    )
    from prefect_dstack._options import OPTION_NAMES

    check_options(options, OPTION_NAMES, own_parameters())
    given = {name: value for name, value in options.items() if value is not None}
    configuration, from_configuration = _without_secret_env(configuration)
    env = {**from_configuration, **checked_env(given.get("env"))}
    code = code_of(given.get("repo_dir"), given.get("local_repo", False), login, folder)
    profile = _profile(given, code, folder)
    loaded = load_configuration(configuration)
    arguments = {name: value for name, value in given.items() if name not in _OWN}
    fallbacks = host_fallbacks(given.get("fallbacks"), given.get("fallback_on_exit"))
    if fallbacks is not None:
        _check_steps(loaded, follows)
    steps = [given, *({**given, **each} for each in (() if fallbacks is None else fallbacks.options))]
    for each in steps if ends else ():
        check_ends(loaded, each.get("max_duration"), profile)
    if all(limit is None for limit in (given.get("max_duration"), loaded.max_duration, profile.max_duration)):
        arguments["max_duration"] = max_duration
    # Not in what is described: with and without them it is the same run, which must be found again.
    reports, tags = arguments.pop("reports", DEFAULT_REPORTS), arguments.pop("tags", None)
    debug, survive = arguments.pop("debug_on_failure", None), arguments.pop("survive", None)
    max_cost = None if (cost := arguments.pop("max_cost", None)) is None else check_max_cost(cost)
    # A renewed secret is the same submission: another execution must find the run of the one before it.
    shown_env = {name: MASK if is_secret(value) else value for name, value in env.items()}
    described = {
        "configuration": loaded.model_dump(mode="json"),
        **{name: _plain(value) for name, value in arguments.items() if value is not None},
        **({"env": shown_env} if env else {}),
        **({"profile": _plain(profile)} if "profile" in given or "profiles_file" in given else {}),
        **code.described,
        **_described_steps(fallbacks),
    }
    is_login_unused = not (code.repo_dir or loaded.repos)
    if is_login_unused:
        # A block may hold the login for other runs.
        code = replace(code, login=GitLogin())
    texts = {name: str(plain(value)) for name, value in env.items()}
    masking = Masking(
        check_mask_env(given.get("mask_env", "secrets")),
        frozenset(names_of_secrets(env) if secret_names is None else secret_names),
    )
    if names_exist:
        check_masked_names(masking.mask_env, loaded, texts)
    return Submission(
        # Not in what is described either: another execution has the same fleet, or a new one.
        configuration=with_current_fleet(loaded, profile),
        arguments={
            **arguments,
            "env": texts or None,
            "profile": profile,
            "reports": reports,
            "tags": tags,
            "debug_on_failure": debug,
            "survive": survive,
            "max_cost": max_cost,
        },
        described=described,
        code=code,
        # The server returns the run's environment, but not the password.
        secrets=collect_secrets(
            loaded,
            env=texts,
            others=[*login.secrets, *current_secrets()],
            mask_env=masking.mask_env,
            secret_names=masking.secret_names,
        ),
        masking=masking,
        fallbacks=fallbacks,
        warnings=[_UNUSED_LOGIN] if is_login_unused and "git_credentials" in given else [],
    )


def _check_steps(configuration: Configuration, follows: bool) -> None:
    from dstack_core.integration import refuse_service

    refuse_service(configuration)
    if not follows:
        _refuse(
            "fallbacks: expected a task that follows its run to the end, got one that only submits it. "
            "Use run_task."
        )


def _described_steps(fallbacks: Fallbacks | None) -> dict[str, Any]:
    if fallbacks is None:
        return {}
    options = [{name: _plain(value) for name, value in each.items()} for each in fallbacks.options]
    on_exit = {str(status): target for status, target in fallbacks.on_exit.items()}
    return {"fallbacks": options, **({"fallback_on_exit": on_exit} if on_exit else {})}


def code_of(
    repo_dir: str | os.PathLike[str] | None,
    local_repo: bool,
    login: GitLogin,
    folder: Path | None = None,
) -> Code:
    """Return the code; a relative ``repo_dir`` is below ``folder``, by default the current directory.

    Raises ``ConfigurationError``.
    """
    if not isinstance(local_repo, bool):
        _refuse(f"local_repo: expected True or False, got {local_repo!r}.")
    if repo_dir is None:
        return Code(None, local_repo, login)
    if not isinstance(repo_dir, str | os.PathLike):
        _refuse(f"repo_dir: expected the path of a directory, got {type(repo_dir).__name__}.")
    path = (folder or Path()) / Path(repo_dir).expanduser()
    if not path.is_dir():
        _refuse(
            f"repo_dir: expected a directory, got {str(path)!r}. A relative path is that of the current "
            "directory of the flow run's process."
            if folder is None
            else f"repo_dir: expected a directory of the worker's machine, got {str(path)!r}."
        )
    return Code(path.absolute(), local_repo, login)


def _without_secret_env(configuration: ConfigurationLike) -> tuple[ConfigurationLike, dict[str, Any]]:
    """Return the configuration without the secrets of its environment, and these."""
    if not isinstance(configuration, Mapping):
        return configuration, {}
    env = configuration.get("env")
    if not isinstance(env, Mapping):
        return with_plain_secrets(configuration), {}
    secret = {name: value for name, value in env.items() if is_secret(value)}
    rest = {name: value for name, value in env.items() if name not in secret}
    return with_plain_secrets({**configuration, "env": rest}), checked_env(secret)


def checked_env(env: object) -> dict[str, Any]:
    """Return the variables as they were given. Raises ``ConfigurationError`` for one that is not a text."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        # What .map() makes of a dict that it should not take apart.
        hint = " With .map(), pass env=unmapped({...}) of Prefect." if isinstance(env, str) else ""
        _refuse(f'env: expected a dict such as {{"EPOCHS": "3"}}, got {type(env).__name__}.{hint}')
    for name, value in env.items():
        held = plain(value)
        if isinstance(held, bool) or not isinstance(held, str | int | float):
            _refuse(f"env: expected text as the value of {name}, got {type(held).__name__}.")
        if held == MASK:
            _refuse(
                f"env: expected the value of {name}, got {MASK!r}, which Prefect stores instead of a secret "
                "that is a flow's parameter. Load the Secret block inside the flow."
            )
    return dict(env)


def _profile(given: Mapping[str, Any], code: Code, folder: Path | None) -> Profile:
    """Return the profile that is named or lies beside the code; never one of this machine's home."""
    from dstack_core import ConfigurationError, Profile, load_profile

    name, file = given.get("profile"), given.get("profiles_file")
    if isinstance(name, Profile):
        return name
    if name is not None and not isinstance(name, str):
        _refuse(f"profile: expected the name of a profile, or a Profile, got {type(name).__name__}.")
    if file is not None:
        if not isinstance(file, str | os.PathLike):
            _refuse(f"profiles_file: expected the path of a file, got {type(file).__name__}.")
        file = (folder or Path()) / Path(file).expanduser()
    elif name is not None and code.repo_dir is None:
        _refuse(
            f"profile: expected profiles_file or repo_dir with profile {name!r}, got neither. "
            "Set profiles_file to the path of a profiles.yml, or repo_dir to a directory with "
            ".dstack/profiles.yml."
        )
    try:
        return load_profile(name, code.repo_dir, file=file, home=False)
    except ConfigurationError as error:
        if file is None or not error.message.startswith("profiles: "):
            raise
        _refuse(f"profiles_file: {error.message.removeprefix('profiles: ')}")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
