"""The SSH keys that a run is submitted with and logged in to (PROTOCOL 2.4.3, 4.2).

A container accepts the one public key that its run was submitted with. So the key for a login is not chosen
but found: among the caller's file, the user's key on the server and ``~/.dstack/ssh/id_rsa``, the one whose
public half the run has. The server's key stays in memory; only ``~/.dstack/ssh/id_rsa`` is ever written, and
only if it is missing. No message holds anything of a private key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._attach.extra import INSTALL, missing_packages, require_packages
from dstack_core._attach.key_text import EncryptedKeyError, check_key_text, public_half, unowned_public_key
from dstack_core.errors import AttachError, ConfigurationError

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger("dstack_core")
_COMMENT = "dstack-core"


@dataclass(frozen=True, slots=True)
class LoginKey:
    """A private key, which stays out of the repr, and ``source``: where it comes from, for messages."""

    source: str
    private: paramiko.PKey = field(repr=False)

    @property
    def public_line(self) -> str:
        """The public half as a line of ``authorized_keys``."""
        return f"{self.private.get_name()} {self.private.get_base64()} {_COMMENT}"

    def is_for(self, public_key: str) -> bool:
        """Return whether ``public_key``, a line of type and base64, is this key's public half."""
        # Without the comment, which every client writes in its own way.
        return self.public_line.split()[:2] == public_key.split()[:2]

    def __str__(self) -> str:
        return f"{self.source} ({describe(self.public_line)})"


class LoginKeys:
    """The keys of one client: the caller's file, the server's, or a generated one.

    ``given_public_key`` (str or None) is the public half of the caller's file.
    """

    def __init__(self, identity_file: str | os.PathLike[str] | None = None) -> None:
        self._given = None if identity_file is None else read_identity_file(identity_file)
        self.given_public_key = None if self._given is None else self._given.public_line

    def own_public_key(self) -> str:
        """Return the public half of ``~/.dstack/ssh/id_rsa``, which is made if it is missing.

        If the file cannot be kept, return a key whose private half is dropped: the run works without it, only
        attaching is not possible, and one warning explains that. The same without the packages of the extra
        ``attach``, which make and read keys, unless a file is there that shows its public half.
        """
        if missing_packages():
            return _public_key_of_file()
        try:
            return _default_key(create=True).public_line
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning(
                "Could not store an SSH key in %s: %s. Submitting without it, so run.attach() will not work. "
                "Pass ssh_identity_file= to Client.from_config.",
                _default_path_text(),
                error,
            )
            return LoginKey("a key that was thrown away", _generate()).public_line

    def for_run(
        self,
        public_key: str,
        server_key: str | None,
        identity: LoginKey | None,
        *,
        any_will_do: bool,
    ) -> LoginKey:
        """Return the key whose public half the run was submitted with.

        Args:
            public_key: The line that the run was submitted with; "" if the server does not show it.
            server_key: The user's private key on the server, in PEM.
            identity: The key that the caller passed for this login alone, instead of all others.
            any_will_do: Whether ``identity`` is used without a comparison, because the login goes through the
                server's SSH proxy, which checks keys itself.

        Raises:
            AttachError: None of the keys fits; it names those that were tried.
        """
        if identity is not None and any_will_do:
            return identity
        candidates = [identity] if identity is not None else self._candidates(server_key)
        chosen = next((key for key in candidates if not public_key or key.is_for(public_key)), None)
        if chosen is None:
            tried = "; ".join(str(key) for key in candidates) or "none"
            raise AttachError(
                f"attach: the run was submitted with the SSH key {describe(public_key)}, "
                f"expected its private half, got {tried}. Pass its file as run.attach(ssh_identity_file=...)."
            )
        return chosen

    def _candidates(self, server_key: str | None) -> list[LoginKey]:
        candidates = [] if self._given is None else [self._given]
        if server_key is not None:
            try:
                candidates.append(
                    LoginKey("the user's key on the server", load_private_key(server_key.encode()))
                )
            except ValueError as error:
                _log.warning("Could not read the user's private key from the server: %s.", error)
        try:
            candidates.append(_default_key(create=False))
        except (OSError, ValueError, RuntimeError) as error:
            _log.debug("No key in %s: %s.", _default_path_text(), error)
        return candidates


def read_identity_file(path: str | os.PathLike[str], subject: str = "ssh_identity_file") -> LoginKey:
    """Return the key of a caller's file. Raises ``ConfigurationError`` if it is missing or cannot be used."""
    require_packages(subject)
    place = Path(path).expanduser()
    try:
        return LoginKey(str(place), load_private_key(place.read_bytes()))
    except OSError as error:
        raise ConfigurationError(
            f"{subject}: {place}: expected a private SSH key, got none ({error.strerror}). Correct the path."
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{subject}: {place}: {error}.") from None


def _default_key(*, create: bool) -> LoginKey:
    path = default_key_path()
    data = keep_or_create(path, _new_pem) if create else path.read_bytes()
    return LoginKey(str(path), load_private_key(data))


def default_key_path() -> Path:
    """Return the path of the key that is used without another one."""
    return Path.home() / ".dstack" / "ssh" / "id_rsa"


def _default_path_text() -> str:
    return "~/.dstack/ssh/id_rsa"


def _new_pem() -> bytes:
    text = io.StringIO()
    _generate().write_private_key(text)
    return text.getvalue().encode()


def _generate() -> paramiko.RSAKey:
    import paramiko

    # RSA with 2048 bits, as dstack's own client makes it, because this file is shared with it. More bits take
    # several times as long, and the first submit waits for them.
    return paramiko.RSAKey.generate(2048)


def load_private_key(data: bytes) -> paramiko.PKey:
    """Return the key in ``data``: OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519.

    Raises ``EncryptedKeyError``, else ``ValueError``, with a message that shows nothing of the key.
    """
    import paramiko
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    read = (
        serialization.load_ssh_private_key
        if b"BEGIN OPENSSH PRIVATE KEY" in data
        else serialization.load_pem_private_key
    )
    try:
        key = read(data, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        # Older versions of the library raise a ValueError for it, newer ones a TypeError.
        if "password" in str(error).lower():
            raise EncryptedKeyError from None
        raise ValueError(
            "expected a private SSH key in OpenSSH, PEM or PKCS#8 form, got something else"
        ) from None
    # cryptography reads more forms than paramiko, so it reads the key and writes it again in the OpenSSH
    # form, the only one that paramiko reads for every type of key.
    kinds: list[tuple[type, type[paramiko.PKey]]] = [
        (rsa.RSAPrivateKey, paramiko.RSAKey),
        (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
        (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
    ]
    kind = next((ours for theirs, ours in kinds if isinstance(key, theirs)), None)
    if kind is None:
        raise ValueError("expected an RSA, ECDSA or Ed25519 key, got another type")
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return kind.from_private_key(io.StringIO(text.decode()))


def check_private_key(data: bytes) -> None:
    """Check a key that another machine will use; raises as ``load_private_key``.

    Without the packages of the extra ``attach``, only its form is checked.
    """
    if missing_packages():
        check_key_text(data)
    else:
        load_private_key(data)


def has_own_key() -> bool:
    """Return whether this process can log in to a run that it submits to a server that keeps no key."""
    if not missing_packages():
        return True
    try:
        return public_half(default_key_path().read_bytes()) is not None
    except (OSError, ValueError, RuntimeError):
        return False


def _public_key_of_file() -> str:
    try:
        line = public_half(default_key_path().read_bytes())
        if line is not None:
            return f"{line} {_COMMENT}"
        reason = f"{_default_path_text()} shows no public half"
    except FileNotFoundError:
        reason = f"{_default_path_text()} does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{_default_path_text()}: {error}"
    _log.warning(
        "The server keeps no SSH key, and %s. Submitting without one, so run.attach() will not work. Run: %s",
        reason,
        INSTALL,
    )
    return unowned_public_key(_COMMENT)


def describe(public_key: str) -> str:
    """Return type, fingerprint and comment of a public key line, as ``ssh-keygen -l`` shows a key."""
    kind, _, rest = public_key.strip().partition(" ")
    blob, _, comment = rest.partition(" ")
    try:
        digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    except binascii.Error:
        return public_key.strip() or "(none)"
    fingerprint = base64.b64encode(digest).decode().rstrip("=")
    return f"{kind} SHA256:{fingerprint}" + (f" {comment}" if comment else "")


def keep_or_create(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the contents of ``path``; make it first if it is missing, readable by its owner alone.

    If several processes make it at once, one wins, and all of them return what that one wrote. Its directory
    is made with mode 0700. Raises ``OSError``.
    """
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A draft that is linked to the name: the name never has half of the contents, and unlike a rename a link
    # does not replace the file of another process.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
    return path.read_bytes()
