"""What the text of a private key shows without a package for cryptography.

A client without the extra ``attach`` reads no key, but it submits runs: some servers want the public half of
the caller's key with each run (PROTOCOL 1.2), and a run may get a private key to clone a repository with.
The OpenSSH form has the public half in clear text, PKCS#1 has the two numbers that it consists of.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from itertools import islice

_BODY = re.compile(rb"-----BEGIN (?P<kind>[A-Z0-9 ]*)PRIVATE KEY-----(?P<body>.*?)-----END ", re.DOTALL)
_OPENSSH_MAGIC = b"openssh-key-v1\0"
_NOT_A_KEY = "expected a private SSH key in OpenSSH, PEM or PKCS#8 form, got something else"
# DER: the tags of what a PKCS#1 key begins with.
_SEQUENCE, _INTEGER = 0x30, 0x02


class EncryptedKeyError(ValueError):
    """A private key that needs a passphrase."""

    def __init__(self) -> None:
        super().__init__(
            "expected a key without a passphrase, got an encrypted one. Remove the passphrase with "
            "ssh-keygen -p"
        )


def check_key_text(data: bytes) -> None:
    """Raise ``EncryptedKeyError`` for an encrypted key, ``ValueError`` for what has not the form of a key."""
    kind, body = _decoded(data)
    if kind == b"OPENSSH ":
        cipher, _, _ = _fields(body, 3)
        if cipher != b"none":
            raise EncryptedKeyError
    elif not body or body[0] != _SEQUENCE:
        raise ValueError(_NOT_A_KEY)


def public_half(data: bytes) -> str | None:
    """Return type and base64 of the public half; None for a form that does not show it.

    Raises as ``check_key_text``.
    """
    check_key_text(data)
    kind, body = _decoded(data)
    if kind == b"OPENSSH ":
        blob = _fields(body, 4, counts_keys=True)[3]
    elif kind == b"RSA ":
        modulus, exponent = islice(_integers(body), 1, 3)
        blob = b"".join(len(each).to_bytes(4) + each for each in (b"ssh-rsa", exponent, modulus))
    else:
        return None
    return f"{blob[4 : 4 + int.from_bytes(blob[:4])].decode('ascii')} {base64.b64encode(blob).decode()}"


def unowned_public_key(comment: str) -> str:
    """Return a line of ``authorized_keys`` without a private half anywhere."""
    # Ed25519: the public half is any 32 bytes.
    blob = b"".join(len(each).to_bytes(4) + each for each in (b"ssh-ed25519", secrets.token_bytes(32)))
    return f"ssh-ed25519 {base64.b64encode(blob).decode()} {comment}"


def _decoded(data: bytes) -> tuple[bytes, bytes]:
    found = _BODY.search(data)
    if found is None:
        raise ValueError(_NOT_A_KEY)
    if found["kind"] == b"ENCRYPTED " or b"ENCRYPTED" in found["body"]:
        raise EncryptedKeyError
    try:
        return found["kind"], base64.b64decode(b"".join(found["body"].split()), validate=True)
    except binascii.Error:
        raise ValueError(_NOT_A_KEY) from None


def _fields(body: bytes, count: int, *, counts_keys: bool = False) -> list[bytes]:
    # Cipher, KDF and its options; then a number of keys; then the public half.
    if not body.startswith(_OPENSSH_MAGIC):
        raise ValueError(_NOT_A_KEY)
    place, fields = len(_OPENSSH_MAGIC), []
    for number in range(count):
        place += 4 if counts_keys and number == 3 else 0
        length = int.from_bytes(body[place : place + 4])
        field = body[place + 4 : place + 4 + length]
        if len(field) < length or place + 4 > len(body):
            raise ValueError(_NOT_A_KEY)
        fields.append(field)
        place += 4 + length
    return fields


def _integers(body: bytes) -> list[bytes]:
    place = _content(body, 0, _SEQUENCE)[0]
    numbers: list[bytes] = []
    while len(numbers) < 3:
        start, end = _content(body, place, _INTEGER)
        numbers.append(body[start:end])
        place = end
    return numbers


def _content(body: bytes, place: int, tag: int) -> tuple[int, int]:
    """Return where the content of a DER element begins and ends."""
    if len(body) < place + 2 or body[place] != tag:
        raise ValueError(_NOT_A_KEY)
    length, place = body[place + 1], place + 2
    if length & 0x80:
        more = length & 0x7F
        length, place = int.from_bytes(body[place : place + more]), place + more
    if len(body) < place + length:
        raise ValueError(_NOT_A_KEY)
    return place, place + length
