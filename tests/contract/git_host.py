"""A Git server over ssh on loopback, from which a run on the test's machine can clone with a key."""

from __future__ import annotations

import contextlib
import io
import shlex
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import paramiko

from tests.rig.ssh_listener import SshListener, SshSession

_CHUNK = 65536


class GitHost:
    """A read-only server of the repositories below a folder, for clients with the private key `key` (its text)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = paramiko.ECDSAKey.generate()
        text = io.StringIO()
        self._key.write_private_key(text)
        self.key = text.getvalue()

    def __enter__(self) -> Self:
        self._listener = SshListener(paramiko.ECDSAKey.generate(), self._session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def url(self, repository: Path) -> str:
        """Return the address of a repository below the folder."""
        return f"ssh://git@127.0.0.1:{self._listener.port}/{repository.relative_to(self.folder)}"

    def _session(self, listener: SshListener) -> SshSession:
        return _Session(listener, self.folder, self._key)


class _Session(SshSession):
    def __init__(self, listener: SshListener, folder: Path, key: paramiko.PKey) -> None:
        super().__init__(listener)
        self._folder = folder
        self._key = key

    def knows(self, username: str, key: paramiko.PKey) -> bool:
        return username == "git" and key.asbytes() == self._key.asbytes()

    def opened(self, channel: paramiko.Channel) -> None:
        """Wait for the command."""

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        program, path = shlex.split(command.decode())
        repository = (self._folder / path.lstrip("/")).resolve()
        if program != "git-upload-pack" or not repository.is_relative_to(self._folder):
            return False
        threading.Thread(target=_upload_pack, args=(channel, repository), daemon=True).start()
        return True


def _upload_pack(channel: paramiko.Channel, repository: Path) -> None:
    command = ["git", "-c", "safe.directory=*", "upload-pack", str(repository)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        threading.Thread(target=_feed, args=(channel, process.stdin), daemon=True).start()
        while data := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]
            channel.sendall(data)
    channel.send_exit_status(process.returncode)
    channel.close()


def _feed(channel: paramiko.Channel, stdin: io.BufferedIOBase) -> None:
    with contextlib.suppress(OSError), stdin:
        while data := channel.recv(_CHUNK):
            stdin.write(data)
            stdin.flush()
