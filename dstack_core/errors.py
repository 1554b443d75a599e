"""The tree of everything this package raises on purpose.

::

    DstackError
    ├── ConfigurationError            the caller's input; raised before anything is sent
    │   ├── ProjectNotConfiguredError     no usable server, project or token was found
    │   └── PortInUseError                a local port the run is to be reached at is taken
    ├── ServerError                   the server's answer, or the way to it
    │   ├── ServerUnreachableError        no usable answer within the retry budget
    │   ├── AuthenticationError           the token was refused (401, 403)
    │   ├── AccessDeniedError             the token is good, the project is not its own (403)
    │   ├── ProjectNotFoundError          no such project on this server (404)
    │   ├── RunNotFoundError              no such run in this project
    │   ├── RequestRejectedError          the server refused the request (400, 422)
    │   │   ├── RunNameTakenError             a run of that name is not ours to take over
    │   │   └── RunNotUpdatableError          a change needs a new run, and the old one is active
    │   ├── UnsupportedServerError        the server is too old for this call or field
    │   └── ProtocolError                 the answer is not one a dstack server gives
    ├── AttachError                   the way into a run's container could not be opened
    ├── RunError                      the run's own outcome
    │   ├── RunFailedError                the run's command or job failed
    │   ├── NoCapacityError               no machine could be had
    │   └── RunStoppedError               somebody stopped or aborted the run
    └── WaitTimeoutError              the caller's own time limit passed (also a TimeoutError)

``RunError`` and the three below it are in ``models/outcome.py``, beside the ``Outcome`` that they carry.

``TransientServerError`` is what transports and the wire raise for a fault that may pass; the retry
wrapper turns it into ``ServerUnreachableError`` when its budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable


class DstackError(Exception):
    """Be the root of every error this package raises.

    ``message`` (str) is one text for a person: what was tried, where, and what to do next.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(DstackError):
    """Say which input is wrong, with its value and the way out; nothing was sent."""


class ProjectNotConfiguredError(ConfigurationError):
    """Say that no server, project or token could be found for the client."""


class PortInUseError(ConfigurationError):
    """Say which local port is taken, and by whom.

    ``port`` (int); ``pid`` (int) of the process that listens there, None when it cannot be seen.
    """

    def __init__(self, message: str, *, port: int, pid: int | None = None) -> None:
        super().__init__(message)
        self.port = port
        self.pid = pid

    def __reduce__(self) -> tuple[Callable[..., PortInUseError], tuple[str, int, int | None]]:
        """Keep ``port`` and ``pid`` when the error crosses a process border."""
        return _port_in_use, (self.message, self.port, self.pid)


def _port_in_use(message: str, port: int, pid: int | None) -> PortInUseError:
    return PortInUseError(message, port=port, pid=pid)


class AttachError(DstackError):
    """Say at which hop the way into a run's container ended, why, and what to do; the run goes on."""


class ServerError(DstackError):
    """Be the root of what the server, or the way to it, did wrong."""


class TransientServerError(ServerError):
    """Report a fault that may pass: a broken connection, 429 or 5xx.

    ``retry_after`` is the server's ``Retry-After`` header as it came, or None.
    """

    def __init__(self, message: str, *, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerUnreachableError(ServerError):
    """Report that the server gave no usable answer within the retry budget."""


class AuthenticationError(ServerError):
    """Report that the server refused the token (PROTOCOL 1.1: 401, 403 "Invalid token")."""


class AccessDeniedError(ServerError):
    """Report that the token's user is no member of the project (PROTOCOL 1.1: 403)."""


class ProjectNotFoundError(ServerError):
    """Report that the server has no such project (PROTOCOL 1.1: 404)."""


class RunNotFoundError(ServerError):
    """Report that the project has no such run (PROTOCOL 1.1: 400 ``resource_not_exists``)."""


class RequestRejectedError(ServerError):
    """Report that the server refused a request (PROTOCOL 1.1: 400 and 422).

    ``code`` is the server's error code (str or None), ``status`` the HTTP status.
    """

    def __init__(self, message: str, *, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class RunNameTakenError(RequestRejectedError):
    """An active run of the wanted name exists, and it is not the one that the caller's marker names."""


class RunNotUpdatableError(RequestRejectedError):
    """An active run that ``apply`` cannot turn into what is wanted; nothing was changed.

    ``changes`` (tuple of str): the keys that need a new run; empty for a run that is stopping.
    """

    def __init__(
        self, message: str, *, code: str | None = None, status: int = 400, changes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, code=code, status=status)
        self.changes = changes


class UnsupportedServerError(ServerError):
    """Report that this server's version does not have the call or the field (PROTOCOL 1.1, 2.2).

    ``status`` is the HTTP status of a call the server does not know, or None.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ProtocolError(ServerError):
    """Report an answer no dstack server gives: another service, a proxy's page, a redirect.

    ``status`` is the HTTP status, or None where it says nothing.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class WaitTimeoutError(DstackError, TimeoutError):
    """Report that the caller's own time limit passed; the run goes on."""
