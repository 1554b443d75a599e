"""Where the dstack server is and who asks: the credentials block, and the clients that are made of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, cast

from prefect.blocks.abstract import CredentialsBlock
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, ValidationError, field_validator, model_validator

from prefect_dstack._secrets import GitCredentialsLike, GitLogin, aload_login, load_login, login_of
from prefect_dstack._submission import Code, code_of
from prefect_dstack._tags import default_tags, one_kind_of_tags

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Client

# Prefect kills a cancelled process after 30 s, so no single wait for a reply may take a big part of that.
# Shorter, and a busy server that replies after 9 s is taken for unreachable.
TIMEOUT = 10.0
# For the few requests that a cancellation cannot interrupt between two tries: longer, and the stop starts
# late.
CALL_BUDGET = 5.0
# As long as a reply may take where nothing kills the process, as with ``get_client``.
PATIENT_TIMEOUT = 30.0
_NO_CODE = Code()
_NO_TAGS: Mapping[str, str] = MappingProxyType({})


class DstackCredentials(CredentialsBlock):
    """The address of a dstack server, a project on it and a user's token.

    ``git_token`` and ``git_private_key`` are what runs clone a private Git repository with, unless a task or
    a work pool has ``git_credentials`` of its own: a token over https, a key over ssh. A wrong value raises
    pydantic's ``ValidationError``. Tokens and keys are secrets: Prefect stores them encrypted and they show
    in no repr. Source: Prefect's documentation, "Blocks".

    Example:
        Load stored credentials:
        ```python
        from prefect_dstack import DstackCredentials

        credentials = DstackCredentials.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name: ClassVar[str | None] = "dstack Credentials"
    _block_type_slug: ClassVar[str | None] = "dstack-credentials"
    _description: ClassVar[str | None] = "Credentials to run tasks and services on a dstack server."
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://dstack.ai/docs/")
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/dstackai.png?size=200")

    server_url: str = Field(
        description="Address of the dstack server with its scheme, such as http://localhost:3000.",
    )
    project_name: str = Field(min_length=1, description="Name of the project on the dstack server.")
    user_token: SecretStr = Field(min_length=1, description="Token of the dstack user.")
    verify: bool | str = Field(
        default=True,
        description="Whether to check the server's TLS certificate, or the path of a CA bundle.",
    )
    git_token: SecretStr | None = Field(
        default=None, description="Token that runs clone a private Git repository with, over https."
    )
    git_private_key: SecretStr | None = Field(
        default=None,
        description="Text of a private SSH key without a passphrase that runs clone with, over ssh.",
    )

    ui_url: str | None = Field(
        default=None,
        description="Address of the dstack server for browsers, if it differs from that for flow runs.",
    )
    default_tags: dict[str, str] | bool | None = Field(
        default=None,
        description="Tags of all runs, such as {team: ml}, beside the automatic ones; off for no tags.",
    )

    if TYPE_CHECKING:
        # What a caller may pass: pydantic turns a text into a secret, which type checkers do not know.
        def __init__(
            self,
            *,
            server_url: str,
            project_name: str,
            user_token: str | SecretStr,
            verify: bool | str = True,
            git_token: str | SecretStr | None = None,
            git_private_key: str | SecretStr | None = None,
            ui_url: str | None = None,
            default_tags: Mapping[str, str] | bool | None = None,
        ) -> None: ...

    @field_validator("server_url", "ui_url")
    @classmethod
    def _has_a_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(
                f"expected an address such as http://localhost:3000, got {value!r}. Begin it with http:// or "
                "https://."
            )
        return value

    @field_validator("default_tags", mode="before")
    @classmethod
    def _is_one_kind_of_tags(cls, value: Any) -> Any:
        return one_kind_of_tags(value)

    @field_validator("ui_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        from dstack_core import ConfigurationError
        from dstack_core.integration import check_address

        try:
            return value and check_address("ui_url", value)
        except ConfigurationError as error:
            raise ValueError(error.message.removeprefix("ui_url: ")) from None

    @field_validator("default_tags")
    @classmethod
    def _are_tags(cls, value: dict[str, str] | bool | None) -> dict[str, str] | bool | None:
        from dstack_core import ConfigurationError
        from dstack_core.integration import check_tags

        try:
            return check_tags("default_tags", value) if isinstance(value, dict) else value
        except ConfigurationError as error:
            raise ValueError(error.message.removeprefix("default_tags: ")) from None

    @model_validator(mode="after")
    def _one_git_login(self) -> Self:
        if self.git_token is not None and self.git_private_key is not None:
            raise ValueError("expected one of git_token and git_private_key, got both. Drop one of the two.")
        return self

    def get_client(
        self,
        *,
        repo_dir: str | os.PathLike[str] | None = None,
        local_repo: bool = False,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        retry_budget: float = 30.0,
    ) -> Client:
        """Return a new client, to be closed by the caller; makes no request.

        Args:
            repo_dir: The directory that the client's runs get, as in ``dstack_core.Client.from_config``.
            local_repo: Upload the directory's contents even if it is a Git checkout.
            timeout: Seconds to wait for each part of a reply.
            connect_timeout: Seconds to wait for each connection.
            retry_budget: Seconds to keep retrying an unreachable server in one call.

        Returns:
            The client; a private Git repository is cloned with this block's ``git_token`` or
            ``git_private_key``.

        Raises:
            ConfigurationError: The directory does not exist.
        """
        from dstack_core import Client

        code = code_of(repo_dir, local_repo, git_login_of(self))
        return Client.from_config(
            **target_of(self),
            **code.arguments,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retry_budget=retry_budget,
        )

    def get_async_client(
        self,
        *,
        repo_dir: str | os.PathLike[str] | None = None,
        local_repo: bool = False,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        retry_budget: float = 30.0,
    ) -> AsyncClient:
        """Return a new async client: the twin of ``get_client``, with its parameters and errors."""
        from dstack_core import AsyncClient

        code = code_of(repo_dir, local_repo, git_login_of(self))
        return AsyncClient.from_config(
            **target_of(self),
            **code.arguments,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retry_budget=retry_budget,
        )


CredentialsLike: TypeAlias = DstackCredentials | str | None
"""A block, the name of a saved block, or None for the environment and ``~/.dstack/config.yml``."""


def git_login_of(block: DstackCredentials) -> GitLogin:
    """Return what runs clone a private repository with, unless they have a login of their own."""
    return login_of(block.git_private_key or block.git_token)


def target_of(block: DstackCredentials | None, tags: Mapping[str, str] = _NO_TAGS) -> dict[str, Any]:
    """Return the arguments of ``from_config`` that name the server; none for the environment's.

    ``tags`` are automatic ones, which the block can turn off.
    """
    defaults = default_tags(None if block is None else block.default_tags, tags)
    more: dict[str, Any] = {"default_tags": defaults} if defaults else {}
    if block is None:
        return more
    if block.ui_url:
        more["ui_url"] = block.ui_url
    return {
        "server_url": block.server_url,
        "project_name": block.project_name,
        "user_token": block.user_token.get_secret_value(),
        "verify": block.verify,
        **more,
    }


def load(credentials: CredentialsLike) -> DstackCredentials | None:
    """Return the block itself, or None for the environment.

    Raises ``ConfigurationError`` for anything else, and for a name that no saved block has.
    """
    if isinstance(credentials, str):
        with _missing_named(credentials):
            # Without _sync a hook that runs inside an event loop would get a coroutine.
            return cast(DstackCredentials, DstackCredentials.load(credentials, _sync=True))  # type: ignore[call-arg]
    return _checked(credentials)


async def aload(credentials: CredentialsLike) -> DstackCredentials | None:
    """Return the block itself, or None: the twin of ``load``."""
    if isinstance(credentials, str):
        with _missing_named(credentials):
            return await DstackCredentials.aload(credentials)
    return _checked(credentials)


def load_git(credentials: DstackCredentials | None, given: GitCredentialsLike) -> GitLogin:
    """Return the Git login that is given, else the one of the block. Raises ``ConfigurationError``."""
    return git_login_of(credentials) if given is None and credentials is not None else load_login(given)


async def aload_git(credentials: DstackCredentials | None, given: GitCredentialsLike) -> GitLogin:
    """Return the Git login: the twin of ``load_git``."""
    return (
        git_login_of(credentials) if given is None and credentials is not None else await aload_login(given)
    )


def open_client(
    credentials: DstackCredentials | None,
    timeout: float = TIMEOUT,
    retry_budget: float = CALL_BUDGET,
    code: Code = _NO_CODE,
    tags: Mapping[str, str] = _NO_TAGS,
) -> Client:
    """Return a new client.

    ``timeout`` and ``retry_budget`` in seconds, ``code`` what its runs start from, ``tags`` their automatic
    tags. Raises ``ProjectNotConfiguredError`` when neither a block nor the environment names a server.
    """
    from dstack_core import Client

    return Client.from_config(
        **target_of(credentials, tags), **code.arguments, timeout=timeout, retry_budget=retry_budget
    )


def open_async_client(
    credentials: DstackCredentials | None,
    timeout: float = TIMEOUT,
    retry_budget: float = CALL_BUDGET,
    code: Code = _NO_CODE,
    tags: Mapping[str, str] = _NO_TAGS,
) -> AsyncClient:
    """Return a new async client: the twin of ``open_client``."""
    from dstack_core import AsyncClient

    return AsyncClient.from_config(
        **target_of(credentials, tags), **code.arguments, timeout=timeout, retry_budget=retry_budget
    )


@contextmanager
def _missing_named(name: str) -> Iterator[None]:
    """Turn Prefect's ``ValueError`` for a missing block into an error of ``credentials``."""
    try:
        yield
    except ValidationError:
        # A ValueError too, but one of a block that exists and cannot be read.
        raise
    except ValueError:
        from dstack_core import ConfigurationError

        raise ConfigurationError(
            f"credentials: expected the name of a saved DstackCredentials block, got {name!r}, which does "
            "not exist. Save it first, or correct the name; `prefect block ls` lists the saved ones."
        ) from None


def _checked(credentials: object) -> DstackCredentials | None:
    if credentials is None or isinstance(credentials, DstackCredentials):
        return credentials
    from dstack_core import ConfigurationError

    raise ConfigurationError(
        "credentials: expected a DstackCredentials block, the name of a saved one, or None for the "
        f"environment, got {type(credentials).__name__}."
    )
