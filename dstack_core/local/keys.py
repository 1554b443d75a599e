"""The SSH key pair of the server's user (PROTOCOL 1.2)."""

from __future__ import annotations

import asyncio


class UserKeys:
    """The RSA key pair of the user, 2048 bits, generated on first use because it takes a moment."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._pair: tuple[str, str] | None = None

    async def pair(self) -> tuple[str, str]:
        """Return the public key (OpenSSH, with its line break) and the private one (PKCS#8 PEM)."""
        async with self._lock:
            if self._pair is None:
                self._pair = await asyncio.to_thread(_generate)
            return self._pair


def _generate() -> tuple[str, str]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return f"{public.decode()} admin\n", private.decode()
