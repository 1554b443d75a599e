"""Key pairs of the rig, and the private keys that a server hands out."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import paramiko
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

# The size of the keys that servers generate; larger ones take longer.
_BITS = 2048


@dataclass(frozen=True)
class KeyPair:
    """An RSA key as text, in the form of SSH files."""

    private: str = field(repr=False)
    public: str


def new_key_pair() -> KeyPair:
    """Generate a key."""
    key = paramiko.RSAKey.generate(_BITS)
    text = io.StringIO()
    key.write_private_key(text)
    return KeyPair(text.getvalue(), f"{key.get_name()} {key.get_base64()}")


def private_key(text: str) -> paramiko.RSAKey:
    """Read an RSA key; servers write theirs as OpenSSH, PKCS #1 or PKCS #8 text."""
    load = load_ssh_private_key if "BEGIN OPENSSH" in text else load_pem_private_key
    key = load(text.encode(), None)
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("private key: expected an RSA key, got another kind")
    return paramiko.RSAKey(key=key)
