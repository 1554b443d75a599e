"""The code that a run starts from, and what it is cloned with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from prefect.blocks.core import Block
from pydantic import SecretStr, ValidationError

from prefect_dstack._secrets import plain

GitCredentialsLike: TypeAlias = Block | SecretStr | Mapping[str, Any] | str | None
"""A block with a token or key, a secret text, a block's fields, or ``"<block type>/<name>"``."""

# The names that blocks of Prefect's own collections and their relatives have for the same thing.
_KEYS = ("git_private_key", "private_key", "ssh_private_key", "ssh_key")
_TOKENS = ("git_token", "token", "access_token", "oauth_token", "personal_access_token", "password", "value")
# What GitLab and Bitbucket want as the user name of a token, written before it in these blocks; dstack
# sends the token alone.
_PREFIXES = ("oauth2:", "x-token-auth:")
_KEY_MARK = "PRIVATE KEY-----"
# Prefect allows no other characters in the two.
_BLOCK_NAME = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class GitLogin:
    """What a repository is cloned with: a private SSH key, a token, or nothing."""

    private_key: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def secrets(self) -> list[str]:
        """What must not show in a log."""
        return [text for text in (self.private_key, self.token) if text]


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
        """What tells one submission from another: no secret, and the same in every checkout of the flow."""
        if self.repo_dir is None:
            return {}
        shown = os.path.relpath(self.repo_dir)
        inside = not shown.startswith(os.pardir)
        return {"repo_dir": shown if inside else self.repo_dir.name, "local_repo": self.local_repo}


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


def load_login(given: GitCredentialsLike) -> GitLogin:
    """Return the login in a block, a secret, or a saved block by name. Raises ``ConfigurationError``."""
    if isinstance(given, str):
        with _missing_named(given):
            # Without _sync a caller inside an event loop would get a coroutine.
            return login_of(Block.load(_saved(given), _sync=True))  # type: ignore[call-arg]
    return login_of(given)


async def aload_login(given: GitCredentialsLike) -> GitLogin:
    """Return the login: the twin of ``load_login``."""
    if isinstance(given, str):
        with _missing_named(given):
            given = await Block.aload(_saved(given))
    return login_of(given)


def login_of(given: object) -> GitLogin:
    """Return the login in a block, a secret text or a block's fields; with nothing given, no login.

    A private key is recognized in a text by its first line. Of a user name and password the password is
    taken: dstack clones over https with a token alone. Raises ``ConfigurationError``.
    """
    if given is None:
        return GitLogin()
    if isinstance(given, Mapping):
        fields: Mapping[str, Any] = given
    elif isinstance(given, Block):
        fields = {name: getattr(given, name) for name in type(given).model_fields}
    else:
        fields = {"value": given}
    value = plain(fields.get("value"))
    if isinstance(value, Mapping):
        fields = value
    key, token = _first(fields, _KEYS), _first(fields, _TOKENS)
    if key is None and token is not None and _KEY_MARK in token:
        key, token = token, None
    if key is not None:
        if _KEY_MARK not in key:
            _refuse(
                'git_credentials: expected the text of a private key ("-----BEGIN ... PRIVATE KEY-----"), '
                "got text that is not a key. Save the content of the key file, not its path."
            )
        return GitLogin(private_key=key)
    if token is None:
        kind = type(given).__name__
        _refuse(
            f"git_credentials: expected a block with a token, a password or a private key, got {kind}"
            f"{' without one' if isinstance(given, Block | Mapping) else ''}. Pass a Secret block, or a "
            "GitHubCredentials, GitLabCredentials or BitBucketCredentials block."
        )
    for prefix in _PREFIXES:
        token = token.removeprefix(prefix)
    return GitLogin(token=token)


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        text = plain(fields.get(name))
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


@contextmanager
def git_credentials_named() -> Iterator[None]:
    """Let an error about a key or token name the argument that it was given as here."""
    from dstack_core import ConfigurationError

    try:
        yield
    except ConfigurationError as error:
        text = re.sub(r"\b(git_private_key|oauth_token)\b", "git_credentials", error.message)
        if text == error.message:
            raise
        raise ConfigurationError(text) from None


@contextmanager
def _missing_named(name: str) -> Iterator[None]:
    """Turn Prefect's ``ValueError`` for a missing block into an error of ``git_credentials``."""
    try:
        yield
    except ValidationError:
        raise
    except ValueError:
        _refuse(
            f'git_credentials: expected the "<type>/<name>" of a saved block, got {name!r}, which does not '
            "exist. Save it first, or correct the name; `prefect block ls` lists the saved ones."
        )


def name_or_secret(text: SecretStr) -> str | SecretStr:
    """Return ``"<block type>/<name>"`` as the name it is, and any other text as a token or a key."""
    shown = text.get_secret_value()
    return shown if _BLOCK_NAME.fullmatch(shown) else text


def _saved(name: str) -> str:
    # What was passed instead of a name may be a token: it is not repeated.
    if not _BLOCK_NAME.fullmatch(name):
        _refuse(
            'git_credentials: expected a block, or the "<type>/<name>" of a saved one such as '
            '"github-credentials/team", got other text. Pass a token as SecretStr, or in a Secret block.'
        )
    return name


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
