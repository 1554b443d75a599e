"""Uploads that are accepted and measured, but not stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paramiko
from paramiko.sftp import SFTP_NO_SUCH_FILE, SFTP_OK

if TYPE_CHECKING:
    from typing_extensions import Buffer

_REGULAR_FILE = 0o100644


class _Upload(paramiko.SFTPHandle):
    def __init__(self, sizes: dict[str, int], path: str) -> None:
        super().__init__()
        self._sizes = sizes
        self._path = path
        sizes[path] = 0

    def write(self, offset: int, data: Buffer) -> int:
        self._sizes[self._path] = max(self._sizes[self._path], offset + memoryview(data).nbytes)
        return SFTP_OK

    def stat(self) -> paramiko.SFTPAttributes:
        return _attributes(self._sizes[self._path])


class DiscardingSftp(paramiko.SFTPServerInterface):
    """An SFTP server that accepts any file and keeps only its size, which clients compare after an upload."""

    def __init__(self, server: paramiko.ServerInterface) -> None:
        super().__init__(server)
        self._sizes: dict[str, int] = {}

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        return _Upload(self._sizes, path)

    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        return _attributes(self._sizes[path]) if path in self._sizes else SFTP_NO_SUCH_FILE

    def chattr(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        return SFTP_OK


def _attributes(size: int) -> paramiko.SFTPAttributes:
    attributes = paramiko.SFTPAttributes()
    attributes.st_size = size
    attributes.st_mode = _REGULAR_FILE
    return attributes
