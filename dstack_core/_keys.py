"""Make the public key that servers before 0.19.33 want with every run (PROTOCOL 2.4.3)."""

from __future__ import annotations


def new_public_key() -> str:
    """Return a new RSA public key in OpenSSH's form; its private half is thrown away.

    Nothing in this package logs in to a run yet, so there is nothing to keep.
    """
    import paramiko

    key = paramiko.RSAKey.generate(2048)
    return f"{key.get_name()} {key.get_base64()} dstack-core"
