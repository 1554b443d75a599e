"""Packing the code and files of a run, and uploading them before it is submitted (PROTOCOL 1.3).

A run without code or files passes through none of this: ``CodeSource.pack`` is called only for a client
from ``from_config``, or for a configuration that has ``repos`` or ``files``. Packing blocks (it runs
git and reads files), so it happens before the flow starts; the flow only uploads. Each client remembers what
the server already has, because a client that submits a hundred runs of one repository uploads it once.

Invariants:
  * Nothing is uploaded for a configuration that is wrong, and nothing is submitted before its uploads.
  * Credentials that the server has are never replaced by none.
  * What is remembered may be wrong, since a repository can be deleted on the server. The submission then
    fails with a clear error, and everything is forgotten, so that the next one uploads it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dstack_core._code.archive import pack_files
from dstack_core._code.repository import Repository
from dstack_core._flow.steps import Op, call
from dstack_core._flow.version_check import VersionCheck
from dstack_core._wire.api import Api
from dstack_core._wire.code import Code, Upload
from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core._wire.spec import with_files, with_repo_place
from dstack_core.errors import RequestRejectedError, UnsupportedServerError
from dstack_core.models.configurations import Configuration

T = TypeVar("T")
_UNKNOWN_REPO = "repo_does_not_exist"


@dataclass(slots=True)
class Delivered:
    """What the server has already, so that it is sent once.

    ``repos`` by id, ``uploads`` by repo id and hash, and the ids of ``archives`` by hash.
    """

    repos: set[str] = field(default_factory=set)
    archives: dict[str, str] = field(default_factory=dict)
    uploads: set[tuple[str, str]] = field(default_factory=set)

    def forget(self) -> None:
        """Forget everything, because the server no longer has what it had."""
        self.repos.clear()
        self.archives.clear()
        self.uploads.clear()


@dataclass(slots=True)
class CodeSource:
    """The code of one client: its repository, and what the server already has of it.

    ``given`` (bool): the client was made by ``from_config``, so that its repository parameters count.
    """

    repository: Repository = field(default_factory=Repository)
    given: bool = False
    _delivered: Delivered = field(default_factory=Delivered, repr=False)

    def pack(self, configuration: Configuration, extra: Sequence[tuple[str, Upload]] = ()) -> Shipment | None:
        """Pack the files, and the archive or diff, that a run starts from; None if there are none.

        ``extra`` are archives with their paths that are left out on a server without files. Runs git and
        reads files. Raises ``ConfigurationError``.
        """
        files = pack_files(configuration.files or [])
        code = self.repository.pack(configuration.repos or ())
        if code is None and not files and not extra:
            return None
        return Shipment(code, files, self._delivered, init=self.repository.init, extra=extra)

    def init(self, api: Api, version_check: VersionCheck) -> Op[None]:
        """Read the repository now; the flow registers it and its credentials with the server."""
        return init_repo(api, self.repository.describe(), self._delivered, version_check)


@dataclass(frozen=True, slots=True)
class Shipment:
    """The code and the files that one run starts from, packed but not uploaded yet."""

    code: Code | None
    files: Sequence[tuple[str, Upload]]
    delivered: Delivered
    init: bool
    extra: Sequence[tuple[str, Upload]] = ()

    @property
    def is_own(self) -> bool:
        """Whether it has code or files of the run's own, beside what every run of its kind gets."""
        return self.code is not None or bool(self.files)

    @property
    def needs(self) -> Sequence[str]:
        """The features that the server must have for this code."""
        place = None if self.code is None else self.code.place
        return place.needs if place else ()

    def submit(
        self,
        api: Api,
        version_check: VersionCheck,
        spec: dict[str, Any],
        send: Callable[[dict[str, Any]], Op[RunSnapshot]],
    ) -> Op[RunSnapshot]:
        """Upload what the server does not have, then ``send`` the spec that refers to it."""
        if self.code is not None and self.code.place is not None:
            spec = with_repo_place(spec, self.code.place, (yield from version_check.release()))
        archives = yield from deliver_files(api, self.files)
        archives += yield from self._deliver_extra(api)
        if archives:
            spec = with_files(spec, archives)
        if self.code is None:
            return (yield from send(spec))
        try:
            yield from deliver_code(api, self.code, self.delivered, version_check, init=self.init)
            return (yield from send(spec))
        except RequestRejectedError as error:
            clearer = explained(error, init=self.init)
            # A refusal for another reason: what the server has is still known.
            if clearer is error:
                raise
            self.delivered.forget()
            raise clearer from None

    def _deliver_extra(self, api: Api) -> Op[list[tuple[str, str]]]:
        """Deliver what a run can do without; nothing to a server that has no files (before 0.19.17)."""
        archives = self.delivered.archives
        for path, upload in self.extra:
            if upload.sha256 not in archives:
                try:
                    ((archive, _),) = yield from deliver_files(api, [(path, upload)])
                except UnsupportedServerError:
                    return []
                archives[upload.sha256] = archive
        return [(archives[upload.sha256], path) for path, upload in self.extra]


def init_repo(
    api: Api, code: Code, delivered: Delivered, version_check: VersionCheck, *, again: bool = True
) -> Op[None]:
    """Register the repo and its credentials with the server, without dropping credentials that it has.

    Registering a repo replaces its credentials, even by none. So a client without a secret of its own first
    fetches the repo, and leaves it alone if it has credentials; without ``again`` also if it is registered at
    all.
    """
    if code.clone is not None and not code.clone.has_secret:
        stored = yield from call(api.find_repo(code.repo_id))
        if stored is not None and (stored.has_secret or (stored.has_clone and not again)):
            delivered.repos.add(code.repo_id)
            return
    release = None if code.clone is None else (yield from version_check.release())
    yield from call(api.init_repo(code, release))
    delivered.repos.add(code.repo_id)


def deliver_code(
    api: Api, code: Code, delivered: Delivered, version_check: VersionCheck, *, init: bool
) -> Op[None]:
    """Register the repo, unless ``init`` is off, and upload its archive or diff, each once.

    Raises ``ConfigurationError`` if the upload is too big for the server.
    """
    if init and code.repo_id not in delivered.repos:
        yield from init_repo(api, code, delivered, version_check, again=False)
    upload = code.upload
    if upload is not None and (code.repo_id, upload.sha256) not in delivered.uploads:
        yield from _uploaded(api.upload_code(code.repo_id, upload), upload)
        delivered.uploads.add((code.repo_id, upload.sha256))


def deliver_files(api: Api, files: Iterable[tuple[str, Upload]]) -> Op[list[tuple[str, str]]]:
    """Return the archive id and the container path of each file; upload those the server does not have.

    Raises ``ConfigurationError`` for an archive that is too big for the server.
    """
    archives: list[tuple[str, str]] = []
    for path, upload in files:
        found = yield from call(api.find_archive(upload.sha256))
        archive = found or (yield from _uploaded(api.upload_archive(upload), upload))
        archives.append((archive, path))
    return archives


def explained(error: RequestRejectedError, *, init: bool) -> RequestRejectedError:
    """Return the error with how to register the repo, if it is not registered; other errors as they are."""
    if error.code != _UNKNOWN_REPO:
        return error
    way_out = (
        "It was deleted there; submit again"
        if init
        else "Call client.repos.init() once, or leave init=True in from_config()"
    )
    return RequestRejectedError(f"{error.message}. {way_out}", code=error.code, status=error.status)


def _uploaded(step: Call[T], upload: Upload) -> Op[T]:
    try:
        return (yield from call(step))
    except RequestRejectedError as error:
        if error.code == _UNKNOWN_REPO:
            raise
        raise upload.too_big(error.message) from None
