"""Read private keys in every common form, and name public ones."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paramiko


class EncryptedKeyError(ValueError):
    """Say that a private key wants a passphrase."""


def load_private_key(data: bytes) -> paramiko.PKey:
    """Return the key in ``data``: OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519.

    Raises ``EncryptedKeyError``, else ``ValueError``, with a text that holds nothing of the key.
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
        # Older versions of the library tell it with a ValueError, newer ones with a TypeError.
        if "password" in str(error).lower():
            raise EncryptedKeyError(
                "expected a key without a passphrase, got an encrypted one. Remove the passphrase with "
                "ssh-keygen -p"
            ) from None
        raise ValueError(
            "expected a private SSH key in OpenSSH, PEM or PKCS#8 form, got another text"
        ) from None
    # The one form that paramiko reads for every type of key.
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


def describe(public_key: str) -> str:
    """Return type, fingerprint and comment of a public key line, as ``ssh-keygen -l`` names a key."""
    kind, _, rest = public_key.strip().partition(" ")
    blob, _, comment = rest.partition(" ")
    try:
        digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    except binascii.Error:
        return public_key.strip() or "(none)"
    fingerprint = base64.b64encode(digest).decode().rstrip("=")
    return f"{kind} SHA256:{fingerprint}" + (f" {comment}" if comment else "")
