"""The tree of the errors that this package raises on purpose.

::

    DstackError
    ├── ConfigurationError            the caller's input; raised before anything is sent
    │   ├── ProjectNotConfiguredError     no usable server, project or token was found
    │   └── PortInUseError                a local port the run is to be reached at is taken
    ├── ServerError                   the server's reply, or the connection to it
    │   ├── ServerUnreachableError        no usable reply within the retry budget
    │   ├── AuthenticationError           the token was refused (401, 403)
    │   ├── AccessDeniedError             the token is good, the project is not its own (403)
    │   ├── ProjectNotFoundError          no such project on this server (404)
    │   ├── RunNotFoundError              no such run in this project
    │   ├── RequestRejectedError          the server refused the request (400, 422)
    │   │   ├── RunNameTakenError             a run of that name is not ours to take over
    │   │   ├── RunNotUpdatableError          a change needs a new run, and the old one is active
    │   │   └── ResourceNameTakenError        a fleet or volume of that name is not the caller's
    │   ├── UnsupportedServerError        the server is too old for this call or field
    │   └── ProtocolError                 the reply is not one that a dstack server sends
    ├── ResourceFailedError           a volume could not be created, or is gone
    ├── AttachError                   the run's container could not be reached over SSH
    ├── RunError                      the run's own outcome
    │   ├── RunFailedError                the run's command or job failed
    │   │   ├── RunUserError                  its command, code, image or another input is wrong
    │   │   ├── RunLimitError                 it passed a limit, such as max_duration
    │   │   ├── RunInfrastructureError        its machine, volume, gateway or server failed
    │   │   ├── RemoteFunctionError           the function that it called raised
    │   │   └── UnusableFunctionError         the call cannot work as it is, however often it is tried
    │   ├── FunctionSkipped               the function that it called had nothing to do
    │   ├── NoCapacityError               no machine was available
    │   │   ├── NoFleetError                  no fleet of the project can take it
    │   │   └── RunInterruptedError           its spot machine was taken away
    │   └── RunStoppedError               a user stopped or aborted the run
    └── WaitTimeoutError              the caller's own time limit passed (also a TimeoutError)

``RunError`` and those below it are in ``models/outcome.py``, beside the ``Outcome`` that they carry.

Transports and the wire raise ``TransientServerError`` for a fault that may pass. The retry wrapper turns it
into ``ServerUnreachableError`` when its budget is used up, so a caller only sees the latter.
"""

from __future__ import annotations

from collections.abc import Callable


class DstackError(Exception):
    """The root of every error that this package raises on purpose.

    Attributes:
        message: One text for a person (str): what was tried, where, and what to do next.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(DstackError):
    """A wrong input, reported before anything is sent: which one, its value and what to do."""


class ProjectNotConfiguredError(ConfigurationError):
    """A client without a usable server, project or token."""


class PortInUseError(ConfigurationError):
    """A local port that is taken by another process.

    Attributes:
        port: The local port (int).
        pid: The id of the process that listens there (int), None if it is not known.
    """

    def __init__(self, message: str, *, port: int, pid: int | None = None) -> None:
        super().__init__(message)
        self.port = port
        self.pid = pid

    def __reduce__(self) -> tuple[Callable[..., PortInUseError], tuple[str, int, int | None]]:
        """Keep ``port`` and ``pid`` when the error is pickled, such as for another process."""
        return _port_in_use, (self.message, self.port, self.pid)


def _port_in_use(message: str, port: int, pid: int | None) -> PortInUseError:
    return PortInUseError(message, port=port, pid=pid)


class ResourceFailedError(DstackError):
    """A volume that could not be created, or that was deleted while it was waited for."""


class AttachError(DstackError):
    """A failed SSH connection to a run's container: which hop failed, why, and what to do.

    The run keeps running.
    """


class ServerError(DstackError):
    """The root of the errors of the server and of the connection to it."""


class TransientServerError(ServerError):
    """A fault that may pass: a broken connection, HTTP 429 or 5xx.

    Attributes:
        retry_after: The server's ``Retry-After`` header as it came (str), or None.
    """

    def __init__(self, message: str, *, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerUnreachableError(ServerError):
    """A server that sent no usable reply within the retry budget; a submitted run keeps running."""


class AuthenticationError(ServerError):
    """A token that the server refused (PROTOCOL 1.1: 401, 403 "Invalid token")."""


class AccessDeniedError(ServerError):
    """A project that the token's user is not a member of (PROTOCOL 1.1: 403)."""


class ProjectNotFoundError(ServerError):
    """A project that the server does not have (PROTOCOL 1.1: 404)."""


class RunNotFoundError(ServerError):
    """A run that the project does not have (PROTOCOL 1.1: 400 ``resource_not_exists``)."""


class RequestRejectedError(ServerError):
    """A request that the server refused (PROTOCOL 1.1: 400 and 422).

    Attributes:
        code: The server's error code (str), or None.
        status: The HTTP status (int).
    """

    def __init__(self, message: str, *, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class RunNameTakenError(RequestRejectedError):
    """An active run that has the wanted name, but not the caller's marker."""


class RunNotUpdatableError(RequestRejectedError):
    """An active run that ``apply`` cannot turn into what is wanted; nothing was changed.

    Attributes:
        changes: The keys that need a new run (tuple of str); empty for a run that is stopping.
    """

    def __init__(
        self, message: str, *, code: str | None = None, status: int = 400, changes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, code=code, status=status)
        self.changes = changes


class ResourceNameTakenError(RequestRejectedError):
    """A fleet or volume that has the wanted name and is not the caller's; nothing was changed."""


class UnsupportedServerError(ServerError):
    """A call or a field that this server's version does not have (PROTOCOL 1.1, 2.2).

    Attributes:
        status: The HTTP status (int) of a call that the server does not know, or None.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ProtocolError(ServerError):
    """A reply that no dstack server sends: from another service, a proxy's page, a redirect.

    Attributes:
        status: The HTTP status (int), or None if it explains nothing.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class WaitTimeoutError(DstackError, TimeoutError):
    """The end of the caller's own time limit; the run keeps running. Also a ``TimeoutError``."""
