"""What the sync and the async client have in common: their parameters, checks and properties; no I/O."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar, Generic, Self, TypeVar

from dstack_core import config
from dstack_core._attach.keys import LoginKeys
from dstack_core._code.deliver import CodeSource
from dstack_core._code.repository import Repository
from dstack_core._flow.follow import LONGEST_LOG_PAUSE
from dstack_core._operations import Operations
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.api import Api
from dstack_core.models.options import check_seconds
from dstack_core.models.tags import check_tags

TransportT = TypeVar("TransportT")


class ClientBase(Generic[TransportT]):
    """The target of a client and its transport; ``Client`` explains the parameters."""

    _longest_log_pause: ClassVar[float] = LONGEST_LOG_PAUSE

    def __init__(
        self,
        *,
        server_url: str | None = None,
        project_name: str | None = None,
        user_token: str | None = None,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        retry_budget: float = 30.0,
        verify: bool | str = True,
        ui_url: str | None = None,
        default_tags: Mapping[str, str] | None = None,
    ) -> None:
        check_seconds("timeout", timeout, above=True)
        check_seconds("connect_timeout", connect_timeout, above=True)
        check_seconds("retry_budget", retry_budget)
        target = config.from_arguments(server_url, project_name, user_token)
        ui_url = config.ui_url(ui_url, of_environment=not server_url)
        tags = {} if default_tags is None else check_tags("default_tags", default_tags)
        settings = TransportSettings(target.server_url, target.token, timeout, connect_timeout, verify)
        self._timeout = timeout
        self._transport = self._new_transport(settings)
        self._operations = Operations(
            Api(target.server_url, target.project, ui_url or target.server_url),
            retry_budget,
            longest_log_pause=self._longest_log_pause,
            default_tags=tags,
        )

    @classmethod
    def from_config(
        cls,
        repo_dir: str | os.PathLike[str] | None = None,
        project_name: str | None = None,
        server_url: str | None = None,
        user_token: str | None = None,
        git_identity_file: str | os.PathLike[str] | None = None,
        oauth_token: str | None = None,
        ssh_identity_file: str | os.PathLike[str] | None = None,
        local_repo: bool = False,
        init: bool = True,
        *,
        git_private_key: str | None = None,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        retry_budget: float = 30.0,
        verify: bool | str = True,
        ui_url: str | None = None,
        default_tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Return a client for the arguments, else the environment, else ``~/.dstack/config.yml``.

        Starts no process, makes no request and writes nothing.

        A Git repository that is not public needs one of ``git_identity_file``, ``git_private_key`` and
        ``oauth_token``; secrets written into the remote's address are not used. Without one, credentials that
        the server has for the repository are kept, such as those of ``dstack init``.

        Args:
            repo_dir: A directory whose contents every run of this client can use; commands start in it. The
                run clones the top of a Git checkout (its remote, branch and newest pushed commit), and what
                differs here, new files included, is uploaded as a diff. Any other directory is uploaded as an
                archive, once while it does not change; ``.git`` and what ``.gitignore`` and ``.dstackignore``
                name stay out. A checkout that a run cannot clone is uploaded too, and a warning names the
                reason. Default: no code.
            project_name: Default: ``DSTACK_PROJECT``, else the file's default project.
            server_url: The server's address; goes together with ``user_token``. Default:
                ``DSTACK_SERVER_URL``, else the file.
            user_token: The token of a user of the server. Default: ``DSTACK_TOKEN``, else the file.
            git_identity_file: The path of a private SSH key without a passphrase; the run clones over ssh.
            oauth_token: A token of the Git server; the run clones over https.
            ssh_identity_file: The path of a private SSH key without a passphrase (OpenSSH, PEM or PKCS#8;
                RSA, ECDSA or Ed25519) that runs are submitted with and ``run.attach()`` logs in with.
                Default: the user's key on the server; with a server older than 0.19.33
                ``~/.dstack/ssh/id_rsa``, which is made with mode 0600 if it is missing.
            local_repo: Upload ``repo_dir`` as an archive even if it is a Git checkout.
            init: Register the repository and its credentials with the server at the first submit. If False,
                call ``client.repos.init()`` once.
            git_private_key: The text of a private SSH key, instead of ``git_identity_file``.
            timeout: Seconds to wait for each part of a reply.
            connect_timeout: Seconds to wait for each connection.
            retry_budget: Seconds for which one call keeps retrying an unreachable server.
            verify: Whether to check TLS certificates, or the path of a CA bundle.
            ui_url: The server's address for browsers, in every address of a page. Default: ``DSTACK_UI_URL``
                unless ``server_url`` is given, else the server's address.
            default_tags: Tags of the machines of every run, as ``tags`` of ``submit``, which wins. A server
                before 0.19.5 gets none of them. Default: none.

        Returns:
            The client.

        Raises:
            ProjectNotConfiguredError: No server, project or token was found.
            ConfigurationError: An argument or the file is wrong.

        Example:
            ``client = Client.from_config(repo_dir=".")``

        Source: the documented API, "from_config()"; PROTOCOL 1.3.
        """
        repository = Repository.checked(
            repo_dir,
            git_identity_file=git_identity_file,
            oauth_token=oauth_token,
            git_private_key=git_private_key,
            local_repo=local_repo,
            init=init,
        )
        keys = LoginKeys(ssh_identity_file)
        target = config.from_config(server_url, project_name, user_token)
        client = cls(
            server_url=target.server_url,
            project_name=target.project,
            user_token=target.token,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retry_budget=retry_budget,
            verify=verify,
            ui_url=config.ui_url(ui_url, of_environment=not server_url),
            default_tags=default_tags,
        )
        # Behind ``__init__``, whose parameters are those of the class: only ``from_config`` takes code and
        # keys.
        client._operations.code = CodeSource(repository, given=True)
        client._operations.keys = keys
        return client

    @property
    def timeout(self) -> float:
        """The seconds that this client waits for each part of a reply."""
        return self._timeout

    @property
    def server_url(self) -> str:
        """Return the server's address, without a slash at its end."""
        return self._operations.api.server_url

    @property
    def project(self) -> str:
        """Return the project's name."""
        return self._operations.api.project

    @property
    def ui_url(self) -> str:
        """Return the server's address for browsers, without a slash at its end."""
        return self._operations.api.ui_url

    def browser_url(self, url: str) -> str:
        """Return an address of the server, such as that of a service, as browsers reach it."""
        return self._operations.api.browser_url(url)

    def run_url(self, run_id: str | None = None) -> str:
        """Return the address of a run's page on the server; without an id, that of the list of runs."""
        api = self._operations.api
        return api.runs_url() if run_id is None else api.run_url(run_id)

    def fleet_url(self, fleet_id: str) -> str:
        """Return the address of a fleet's page on the server."""
        return self._operations.api.fleet_url(fleet_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(server_url={self.server_url!r}, project_name={self.project!r})"

    def _new_transport(self, settings: TransportSettings) -> TransportT:
        raise NotImplementedError
