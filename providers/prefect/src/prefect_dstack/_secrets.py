"""Secrets from where Prefect keeps them: environment values, and what a Git repository is cloned with.

What is taken out of a block here is hidden wherever it could show: ``GitLogin`` has no repr of it, error
messages do not repeat it, and the log relay masks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from prefect.blocks.core import Block
from pydantic import Secret as PydanticSecret
from pydantic import SecretStr, ValidationError

if TYPE_CHECKING:
    from dstack_core.integration import MaskEnv

GitCredentialsLike: TypeAlias = Block | SecretStr | Mapping[str, Any] | str | None
"""A block with a token or key, a secret text, a block's fields, or ``"<block type>/<name>"``."""

_SECRET_TYPES = (SecretStr, PydanticSecret)
# Prefect's own variables on a machine are not secret, apart from the login.
_PREFECTS = "PREFECT_"
_PREFECTS_SECRETS = ("_KEY", "_AUTH_STRING")
# What Prefect replaces in the variables of a work pool, deployment or flow run.
_TEMPLATE = re.compile(r"\{\{\s*prefect\.(?:blocks|variables)\.")
# A few lines of a UI.
_SHOWN_CHARACTERS = 1000
# The names that blocks of Prefect's own collections and their relatives have for the same thing.
_KEYS = ("git_private_key", "private_key", "ssh_private_key", "ssh_key")
_TOKENS = ("git_token", "token", "access_token", "oauth_token", "personal_access_token", "password", "value")
# What GitLab and Bitbucket want as the user name of a token, written before it in these blocks; dstack
# sends the token alone.
_PREFIXES = ("oauth2:", "x-token-auth:")
# The first line of a private key ends so; no token does.
_KEY_MARK = "PRIVATE KEY-----"
# Prefect allows no other characters in a block type and a block name.
_BLOCK_NAME = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Masking:
    """Which values of a run's environment are masked.

    ``mask_env`` is the option; ``secret_names`` are variables whose values come from a secret of Prefect's.
    """

    mask_env: MaskEnv = "secrets"
    secret_names: Collection[str] = ()

    @classmethod
    def from_dict(cls, run: Mapping[str, Any], mask_env: MaskEnv | None) -> Masking:
        """Return that of what ``submit_run`` returned; ``mask_env``, if given, replaces its option."""
        from dstack_core.integration import check_mask_env

        found = run.get("mask_env", "secrets") if mask_env is None else mask_env
        return cls(check_mask_env(found), tuple(run.get("secret_names") or ()))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-plain values."""
        names = self.mask_env if isinstance(self.mask_env, str) else list(self.mask_env)
        return {"mask_env": names, "secret_names": sorted(self.secret_names)}

    def secrets_in(self, env: Mapping[str, str]) -> list[str]:
        """Return the values of a run's environment that are masked."""
        from dstack_core.integration import collect_secrets

        # The address of Prefect's server and the like are not secret, even if all values of a run are.
        shown = _own(env) if self.mask_env == "all" else env
        return collect_secrets(env=shown, mask_env=self.mask_env, secret_names=self.secret_names)


def shown_env(env: Mapping[str, str], mask: Callable[[str], str]) -> str:
    """Return a run's environment for a cell of a table, without Prefect's own variables; cut where long."""
    texts = [f"{name}={mask(value)}" for name, value in _own(env).items() if not name.startswith(_PREFECTS)]
    text = ", ".join(texts)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} [...]"


def names_of_secrets(env: object) -> set[str]:
    """Return the variables whose values are secrets, or templates of Prefect's blocks and variables."""
    if not isinstance(env, Mapping):
        return set()
    return {str(name) for name, value in env.items() if is_secret(value) or _from_prefect(value)}


def _from_prefect(value: object) -> bool:
    return isinstance(value, str) and _TEMPLATE.search(value) is not None


def _own(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if not name.startswith(_PREFECTS) or name.endswith(_PREFECTS_SECRETS)
    }


def is_secret(value: object) -> bool:
    """Whether a value is a ``Secret`` block or one of pydantic's secret types."""
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return isinstance(held, _SECRET_TYPES)


def plain(value: Any) -> Any:
    """Return what a secret holds, and any other value as it is."""
    # A Secret block's own get() would read the text "1e5" as a number.
    held = getattr(value, "value", None) if isinstance(value, Block) else value
    return held.get_secret_value() if isinstance(held, _SECRET_TYPES) else value


def with_plain_secrets(value: Any) -> Any:
    """Return a copy of nested mappings and lists with what each secret holds in its place."""
    if isinstance(value, Mapping):
        return {key: with_plain_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_plain_secrets(item) for item in value]
    return plain(value)


@dataclass(frozen=True, slots=True)
class GitLogin:
    """What a repository is cloned with: a private SSH key, a token, or nothing."""

    private_key: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def secrets(self) -> list[str]:
        """What must not show in a log."""
        return [text for text in (self.private_key, self.token) if text]


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
    # A Secret block may hold a JSON object: its fields count then.
    value = plain(fields.get("value"))
    if isinstance(value, Mapping):
        fields = value
    key, token = _first(fields, _KEYS), _first(fields, _TOKENS)
    # A Secret block or secret text has one value, whichever of the two it is.
    if key is None and token is not None and _KEY_MARK in token:
        key, token = token, None
    if key is not None:
        if _KEY_MARK not in key:
            _refuse(
                "git_credentials: expected the contents of a private key file "
                '("-----BEGIN ... PRIVATE KEY-----"), got a string that is not a key. '
                "Save the contents of the file, not its path."
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


def name_or_secret(text: SecretStr) -> str | SecretStr:
    """Return ``"<block type>/<name>"`` as the name it is, and any other text as a token or a key."""
    shown = text.get_secret_value()
    return shown if _BLOCK_NAME.fullmatch(shown) else text


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
        # Without its cause, which would name the other argument again.
        raise ConfigurationError(text) from None


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        text = plain(fields.get(name))
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


@contextmanager
def _missing_named(name: str) -> Iterator[None]:
    """Turn Prefect's ``ValueError`` for a missing block into an error of ``git_credentials``."""
    try:
        yield
    except ValidationError:
        # A ValueError too, but one of a block that exists and cannot be read.
        raise
    except ValueError:
        _refuse(
            f'git_credentials: expected the "<type>/<name>" of a saved block, got {name!r}, which does not '
            "exist. Save it first, or correct the name; `prefect block ls` lists the saved ones."
        )


def _saved(name: str) -> str:
    # What was passed instead of a name may be a token, so the message does not repeat it.
    if not _BLOCK_NAME.fullmatch(name):
        _refuse(
            'git_credentials: expected a block, or the "<type>/<name>" of a saved one such as '
            '"github-credentials/team", got other text. Pass a token as SecretStr, or in a Secret block.'
        )
    return name


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
