"""What the sync and the async client and run have in common: all that does not wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import ClassVar, Generic, Self, TypeVar

from dstack_core import config
from dstack_core._attach.attachment import Attachment
from dstack_core._attach.keys import LoginKeys
from dstack_core._code.deliver import CodeSource
from dstack_core._code.repository import Repository
from dstack_core._flow.follow import LONGEST_LOG_PAUSE
from dstack_core._flow.raw_log import ChunkOptions
from dstack_core._flow.retry import TimeLimit, within
from dstack_core._flow.steps import Flow
from dstack_core._flow.stop_options import Check, StopTarget
from dstack_core._operations import Operations
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import time_of
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.models.options import check_callable, check_seconds
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus

TransportT = TypeVar("TransportT")


class ClientBase(Generic[TransportT]):
    """Hold the target and its transport; the parameters are told by ``Client``."""

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
    ) -> None:
        check_seconds("timeout", timeout, above=True)
        check_seconds("connect_timeout", connect_timeout, above=True)
        check_seconds("retry_budget", retry_budget)
        target = config.from_arguments(server_url, project_name, user_token)
        settings = TransportSettings(target.server_url, target.token, timeout, connect_timeout, verify)
        self._timeout = timeout
        self._transport = self._new_transport(settings)
        self._operations = Operations(
            Api(target.server_url, target.project), retry_budget, longest_log_pause=self._longest_log_pause
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
    ) -> Self:
        """Return a client for the arguments, else the environment, else ``~/.dstack/config.yml``.

        ``repo_dir``: a directory whose contents every run of this client can use; commands start in it. The
        top of a Git checkout is cloned by the run (its remote, branch and newest pushed commit), and what
        differs here, new files included, is uploaded as a diff. Any other directory, or any with
        ``local_repo``, is uploaded as an archive (once while it does not change); what ``.gitignore`` and
        ``.dstackignore`` name and ``.git`` stay out. A checkout that a run cannot clone is uploaded, too, and
        the log says why.

        A Git repository that is not public needs one of ``git_identity_file`` (path of a private SSH key
        without passphrase, for a clone over ssh), ``git_private_key`` (the text of such a key) and
        ``oauth_token`` (for a clone over https); secrets written into the remote's address are not used.
        Without one, credentials that the server has for it are kept, such as those of ``dstack init``. With
        ``init`` the first submit makes the repository and its credentials known to the server; without
        it, ``client.repos.init()`` has to, once.

        ``project_name`` defaults to ``DSTACK_PROJECT``, else the file's default project. ``server_url``
        and ``user_token`` go together. ``ssh_identity_file``: the path of a private SSH key without a
        passphrase (OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519) that runs are submitted with and
        ``run.attach()`` logs in with; without it the user's key on the server, and with a server older than
        0.19.33 ``~/.dstack/ssh/id_rsa``, which is made with 0600 where it is missing. Other parameters as
        for the class. Raises ``ProjectNotConfiguredError`` and ``ConfigurationError``; starts no process,
        makes no request and writes nothing. Source: the documented API, "from_config()"; PROTOCOL 1.3.
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
        )
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

    def run_url(self, run_id: str | None = None) -> str:
        """Return the address of a run's page on the server; without an id, that of the list of runs."""
        api = self._operations.api
        return api.runs_url() if run_id is None else api.run_url(run_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(server_url={self.server_url!r}, project_name={self.project!r})"

    def _new_transport(self, settings: TransportSettings) -> TransportT:
        raise NotImplementedError


class RunBase(Generic[TransportT]):
    """One run; the attributes are as of the last poll."""

    def __init__(self, operations: Operations, transport: TransportT, snapshot: RunSnapshot) -> None:
        self._operations = operations
        self._transport = transport
        self._snapshot = snapshot
        self._attachment: Attachment | None = None
        self._attach_asked = False
        # Whether this client submitted the run, so that its name was its own when it was last seen.
        self._is_own = False

    @property
    def is_attached(self) -> bool:
        """Tell whether ``attach()`` opened a tunnel that ``detach()`` has not closed yet."""
        return self._attachment is not None

    @property
    def ports(self) -> Mapping[int, int]:
        """Return, while attached, the local port of each port of the container; else nothing.

        The local ports are those of 127.0.0.1.
        """
        return {} if self._attachment is None else self._attachment.ports

    @property
    def name(self) -> str:
        """Return the run's name, unique within the project."""
        return self._snapshot.name

    @property
    def id(self) -> str:
        """Return the run's id (a UUID), unique for ever."""
        return self._snapshot.id

    @property
    def url(self) -> str:
        """Return the address of the run's page on the server."""
        return self._operations.api.run_url(self.id)

    @property
    def marker(self) -> str | None:
        """Return what the owner wrote on the run when it was submitted."""
        return self._snapshot.marker

    @property
    def last_status(self) -> RunStatus:
        """The run's status as of the last poll, among the documented ones; makes no request.

        A poll is each request for the run by this object: ``status``, ``refresh``, ``wait``, ``follow``, or
        what it came from. With a ``SharedAsyncClient`` following does not count.
        """
        return self._snapshot.status

    @property
    def raw_status(self) -> str:
        """The status in the server's own word, as of the last poll."""
        return self._snapshot.raw_status

    @property
    def status_message(self) -> str | None:
        """Return what the server says beyond the status (``"exited (7)"``), as of the last look, or None."""
        return self._snapshot.message

    @property
    def termination_reason(self) -> str | None:
        """Return why the run ends or ended, in the server's own word (PROTOCOL 1.6), or None."""
        return self._snapshot.reason

    @property
    def error(self) -> str | None:
        """Return the server's own text for what went wrong with the run, or None."""
        return self._snapshot.error

    @property
    def cost(self) -> float:
        """Return what the run has cost (USD), as of the last look."""
        return self._snapshot.cost

    @property
    def submitted_at(self) -> datetime:
        """Return when the run was submitted (aware)."""
        return time_of(self._snapshot.submitted_at)

    @property
    def deployment_num(self) -> int:
        """How many times the run was updated in place, as of the last poll (PROTOCOL 1.4)."""
        return self._snapshot.deployment

    @property
    def service_url(self) -> str | None:
        """Return the whole address a service answers at; None for a run that is no service.

        Unless the service was submitted with ``auth=False``, requests need the header
        ``Authorization: Bearer TOKEN`` with the token of a project member. Source: PROTOCOL 1.9.
        """
        service = self._snapshot.service
        return self._operations.api.absolute(service.url) if service else None

    @property
    def service_model(self) -> str | None:
        """Return the name of the model the service answers for, or None."""
        return self._snapshot.service.model if self._snapshot.service else None

    @property
    def service_model_url(self) -> str | None:
        """Return the base address of the model's OpenAI-compatible API, or None without a model."""
        url = self._snapshot.service.model_url if self._snapshot.service else None
        return self._operations.api.absolute(url) if url else None

    @property
    def env(self) -> Mapping[str, str]:
        """Return the environment variables the run was submitted with; their values may be secrets."""
        return self._snapshot.env

    def outcome(self) -> Outcome | None:
        """Return how the run ended, or None when it is not over as of the last look."""
        return None if self._snapshot.is_active else outcome_of(self._snapshot, self.url)

    def __repr__(self) -> str:
        kind, status = type(self).__name__, str(self._snapshot.status)
        return f"{kind}(name={self.name!r}, id={self.id!r}, status={status!r})"

    def _follow(
        self,
        progress: Progress | None,
        *,
        poll_interval: float,
        logs: bool,
        retry_budget: float,
        timeout: float | None = None,
        sleep: object = None,
    ) -> Flow[Outcome]:
        check_callable("sleep", sleep)
        check_seconds("timeout", timeout, above=True)
        flow = self._operations.follow(
            progress or Progress(self.name, self.id),
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
            on_poll=self._on_poll(),
        )
        limit = self._limit(timeout, "had not finished")
        return flow if limit is None else within(flow, replace(limit, last_request=0.0))

    def _on_poll(self) -> Callable[[RunSnapshot], None] | None:
        """Return what gets the run as each poll of a follower shows it."""
        return self._see

    def _see(self, snapshot: RunSnapshot) -> None:
        self._snapshot = snapshot

    def _limit(self, timeout: float | None, what: str) -> TimeLimit | None:
        check_seconds("timeout", timeout)
        if timeout is None:
            return None
        return TimeLimit(
            timeout, f"Run {self.name} {what} after {timeout:g} s", self.url, self._operations.clock
        )

    @property
    def _check(self) -> Check:
        return Check.IF_ANSWERED if self._is_own else Check.ALWAYS

    @property
    def _target(self) -> StopTarget:
        return StopTarget(self.name, self.marker, self.id)

    def _chunks(self, options: ChunkOptions) -> Flow[None]:
        """Read the log, live where there is a live one: of an attached run with one job."""
        attachment = self._attachment
        plain = (options.start_time, options.diagnose, options.node) == (None, False, None)
        if attachment is not None and attachment.one_job and plain:
            return self._operations.live_chunks(
                self.name, self.id, attachment, poll_interval=options.poll_interval
            )
        follow = options.follow or self._attach_asked
        return self._operations.chunks(self.name, self.id, replace(options, follow=follow))
