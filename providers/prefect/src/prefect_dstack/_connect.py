"""Open clients for a block, the name of a saved block, or the environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_dstack._code import Code, GitCredentialsLike, GitLogin, aload_login, load_login
from prefect_dstack.credentials import DstackCredentials, git_login_of, target_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from dstack_core import AsyncClient, Client

CredentialsLike: TypeAlias = DstackCredentials | str | None
"""A block, the name of a saved block, or None for the environment and ``~/.dstack/config.yml``."""

# Prefect kills a cancelled process after 30 s: no single wait for a reply may take a big part of that.
TIMEOUT = 10.0
# For the few requests that cannot be interrupted by a cancellation between two tries.
CALL_BUDGET = 5.0
# As long as a reply may take where nothing kills the process.
PATIENT_TIMEOUT = 30.0
# An artifact or a state is not worth waiting longer for: a run's end is.
_PREFECT_SECONDS = 5.0
_NO_CODE = Code()


def load(credentials: CredentialsLike) -> DstackCredentials | None:
    """Return the block itself, or None for the environment.

    Raises ``ConfigurationError`` for anything else, and Prefect's ``ValueError`` for a name that no
    saved block has.
    """
    if isinstance(credentials, str):
        # Without _sync a hook that runs inside an event loop would get a coroutine.
        return cast(DstackCredentials, DstackCredentials.load(credentials, _sync=True))  # type: ignore[call-arg]
    return _checked(credentials)


async def aload(credentials: CredentialsLike) -> DstackCredentials | None:
    """Return the block itself, or None: the twin of ``load``."""
    if isinstance(credentials, str):
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
) -> Client:
    """Return a new client; ``timeout`` and ``retry_budget`` in seconds, ``code`` what its runs start from.

    Raises ``ProjectNotConfiguredError`` when neither a block nor the environment names a server.
    """
    from dstack_core import Client

    return Client.from_config(
        **target_of(credentials), **code.arguments, timeout=timeout, retry_budget=retry_budget
    )


def open_async_client(
    credentials: DstackCredentials | None,
    timeout: float = TIMEOUT,
    retry_budget: float = CALL_BUDGET,
    code: Code = _NO_CODE,
) -> AsyncClient:
    """Return a new async client: the twin of ``open_client``."""
    from dstack_core import AsyncClient

    return AsyncClient.from_config(
        **target_of(credentials), **code.arguments, timeout=timeout, retry_budget=retry_budget
    )


@contextmanager
def quick_prefect_client(seconds: float = _PREFECT_SECONDS) -> Iterator[SyncPrefectClient]:
    """Open a client of the Prefect server that waits ``seconds`` for a reply and retries nothing."""
    from prefect.client.orchestration import get_client

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": seconds}, sync_client=True) as client,
    ):
        yield client


def _checked(credentials: object) -> DstackCredentials | None:
    if credentials is None or isinstance(credentials, DstackCredentials):
        return credentials
    from dstack_core import ConfigurationError

    raise ConfigurationError(
        "credentials: expected a DstackCredentials block, the name of a saved one, or None for the "
        f"environment, got {type(credentials).__name__}."
    )
