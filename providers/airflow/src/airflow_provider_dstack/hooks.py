"""Connect to a dstack server with an Airflow connection."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlsplit

from airflow_provider_dstack._compat import (
    AirflowFailException,
    AirflowNotFoundException,
    BaseHook,
    mask_secret,
)

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from dstack_core import AsyncClient, Client

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# The user waits for the test on a page. With less, a slow server looks like a wrong address.
_TEST_SECONDS = 5.0
# No run has this name, so a reply shows that server, token and project are right.
_PROBE = "airflow-connection-test"


class DstackHook(BaseHook):
    """The maker of clients for the dstack server that an Airflow connection of type ``dstack`` names.

    The connection's host is the server's URL, its password the token; the project is its login, or
    ``project`` in its extra. Further keys of the extra: ``verify`` (bool), ``ca_bundle`` (path),
    ``timeout`` (seconds), ``ui_url`` (the server's address for browsers) and ``default_tags`` (a dict of tags
    for every run; False for no automatic ones either). No method but ``test_connection`` makes a request.

    Args:
        dstack_conn_id: The connection. Default ``dstack_default``.
        project_name: The project, instead of the connection's. Default: the connection's.
        **kwargs: As for Airflow's ``BaseHook``.

    Example:
        ``DstackHook().client().runs.list()``

    Source: Airflow documentation, "Managing Connections".
    """

    conn_name_attr: ClassVar[str] = "dstack_conn_id"
    default_conn_name: ClassVar[str] = "dstack_default"
    conn_type: ClassVar[str] = "dstack"
    hook_name: ClassVar[str] = "dstack"

    def __init__(
        self, dstack_conn_id: str = default_conn_name, project_name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name

    def get_conn(self) -> Client:
        """Return a client that retries an unreachable server for 30 seconds.

        Raises ``AirflowFailException`` when the connection is missing or incomplete; makes no request.
        """
        return self.client()

    def client(
        self,
        *,
        timeout: float | None = None,
        connect_timeout: float | None = None,
        retry_budget: float | None = None,
    ) -> Client:
        """Return a new client; makes no request.

        Args:
            timeout: Seconds to wait for each reply. Default: the connection's, else that of
                ``Client``.
            connect_timeout: Seconds to wait for each connection. Default: that of ``Client``.
            retry_budget: Seconds to keep retrying an unreachable server. Default: that of ``Client``.

        Raises:
            AirflowFailException: The connection is missing or incomplete.
        """
        from dstack_core import Client, ConfigurationError

        try:
            return Client(**self.client_arguments(timeout, connect_timeout, retry_budget))
        except ConfigurationError as error:
            raise self._unusable(error.message) from None

    def client_with_code(
        self,
        repo_dir: str | os.PathLike[str] | None = None,
        *,
        retry_budget: float | None = None,
        local_repo: bool = False,
        git_conn_id: str | None = None,
        automatic_tags: Mapping[str, str] | None = None,
    ) -> Client:
        """Return a client whose runs get code, as ``Client.from_config`` describes; makes no request.

        Args:
            repo_dir: The directory or Git checkout that runs get; None for none.
            retry_budget: As for ``client``.
            local_repo: Whether the contents of a Git checkout are uploaded instead of cloned.
            git_conn_id: The connection of Airflow's type ``git`` whose access token or private key runs clone
                with; None for a public repository.
            automatic_tags: Tags of the client's runs, under those of the connection; unless that wants none.

        Raises:
            AirflowFailException: A connection is missing or incomplete, or ``repo_dir`` is not a directory.
        """
        from airflow_provider_dstack._git_connection import git_credentials
        from airflow_provider_dstack._parameters import in_words_of_operator
        from dstack_core import Client, ConfigurationError

        if repo_dir is None and git_conn_id is None:
            try:
                return Client(
                    **self.client_arguments(retry_budget=retry_budget, automatic_tags=automatic_tags)
                )
            except ConfigurationError as error:
                raise self._unusable(error.message) from None
        try:
            return Client.from_config(
                repo_dir,
                local_repo=local_repo,
                **git_credentials(git_conn_id),
                **self.client_arguments(retry_budget=retry_budget, automatic_tags=automatic_tags),
            )
        except ConfigurationError as error:
            # Raises instead if the fault is the connection's, whose name the user has to read.
            self.client(retry_budget=retry_budget).close()
            raise AirflowFailException(in_words_of_operator(error.message)) from None

    def async_client(self, *, retry_budget: float | None = None) -> AsyncClient:
        """Return a new client for use in one event loop: the twin of ``client``.

        It shares its connections and status reads with the others of that loop. Looks the connection up
        when that was not done before, which blocks.
        """
        from dstack_core import ConfigurationError, SharedAsyncClient

        try:
            return SharedAsyncClient(**self.client_arguments(retry_budget=retry_budget))
        except ConfigurationError as error:
            raise self._unusable(error.message) from None

    def client_arguments(
        self,
        timeout: float | None = None,
        connect_timeout: float | None = None,
        retry_budget: float | None = None,
        automatic_tags: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return the keyword arguments for a ``dstack_core.Client``, the token included; makes no request.

        Args:
            timeout: As for ``client``.
            connect_timeout: As for ``client``.
            retry_budget: As for ``client``.
            automatic_tags: As for ``client_with_code``.

        Raises:
            AirflowFailException: The connection is missing or incomplete.
            ConfigurationError: Its ``default_tags`` are wrong.
        """
        from airflow_provider_dstack._tags import default_tags

        connection = self._connection
        extra = connection.extra_dejson
        verify = extra.get("ca_bundle") or extra.get("verify")
        limits = {
            "timeout": timeout if timeout is not None else _seconds(extra.get("timeout")),
            "connect_timeout": connect_timeout,
            "retry_budget": retry_budget,
        }
        more = {
            "ui_url": extra.get("ui_url") or None,
            "default_tags": default_tags(extra.get("default_tags"), automatic_tags or {}) or None,
        }
        return {
            "server_url": self._server_url(connection),
            "project_name": self.project,
            "user_token": self.token,
            "verify": True if verify is None else _as_verify(verify),
            **{name: value for name, value in {**limits, **more}.items() if value is not None},
        }

    def headers(self) -> dict[str, str]:
        """Return what requests to a service of the project have to carry, unless it has ``auth: false``.

        Raises ``AirflowFailException`` when the connection is missing or has no token.
        """
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def project(self) -> str:
        """Return the project's name. Raises ``AirflowFailException`` when none is given."""
        connection = self._connection
        project = self.project_name or connection.extra_dejson.get("project") or connection.login
        if not project:
            raise self._unusable("expected a project, got none. Fill in Project, or pass project_name.")
        if quote(str(project), safe="") != project:
            raise self._unusable(
                f"expected a project's name, got {project!r}. It is the word in the project's address."
            )
        return str(project)

    def test_connection(self) -> tuple[bool, str]:
        """Return whether server, token and project are right, and in words which of them is wrong."""
        from dstack_core import (
            AccessDeniedError,
            AuthenticationError,
            DstackError,
            ProjectNotFoundError,
            ProtocolError,
            RequestRejectedError,
            ServerUnreachableError,
            UnsupportedServerError,
        )

        try:
            with self.client(
                timeout=_TEST_SECONDS, connect_timeout=_TEST_SECONDS, retry_budget=0.0
            ) as client:
                client.runs.get(_PROBE)
                return True, f"Connected to project {client.project} on {client.server_url}"
        except AirflowFailException as error:
            return False, str(error)
        except ServerUnreachableError as error:
            return False, f"Wrong server URL, or the server is down: {error.message}"
        except (ProtocolError, RequestRejectedError, UnsupportedServerError) as error:
            # No dstack server refuses to look for a run.
            return False, f"Wrong server URL, something else answers there: {error.message}"
        except AuthenticationError as error:
            return False, f"Wrong token: {error.message}"
        except ProjectNotFoundError as error:
            return False, f"No such project: {error.message}"
        except AccessDeniedError as error:
            return False, f"No access to the project: {error.message}"
        except DstackError as error:
            return False, error.message

    @cached_property
    def _connection(self) -> Connection:
        try:
            connection = self.get_connection(self.dstack_conn_id)
        except AirflowNotFoundException as error:
            raise AirflowFailException(
                "dstack_conn_id: expected a connection of type dstack, got none called "
                f"{self.dstack_conn_id!r} ({error}). Add it with the server's URL as host, the project as "
                "login, and the token as password."
            ) from None
        if connection.password:
            mask_secret(connection.password)
        return connection

    @property
    def token(self) -> str:
        """Return the user's token. Raises ``AirflowFailException`` when there is none."""
        token = self._connection.password
        if not token:
            raise self._unusable("expected a token, got none. Fill in Token (the password).")
        return token

    def _server_url(self, connection: Connection) -> str:
        host = (connection.host or "").strip().rstrip("/")
        if not host:
            raise self._unusable("expected a server URL, got none. Fill in Server URL (the host).")
        if "://" not in host:
            name = urlsplit(f"//{host}").hostname
            scheme = connection.schema or ("http" if name in _LOOPBACK else "https")
            host = f"{scheme}://{host}"
        # A connection written as a URI has its port in a field of its own.
        if connection.port and urlsplit(host).port is None:
            host = f"{host}:{connection.port}"
        return host

    def _unusable(self, why: str) -> AirflowFailException:
        return AirflowFailException(f"Connection {self.dstack_conn_id!r}: {why}")


def _seconds(value: object) -> float | None:
    try:
        return float(str(value)) if value not in (None, "") else None
    except ValueError:
        raise AirflowFailException(
            f"timeout in the connection's extra: expected a number of seconds, got {value!r}."
        ) from None


def _as_verify(value: object) -> bool | str:
    text = str(value).strip()
    return {"true": True, "false": False}.get(text.lower(), text)
